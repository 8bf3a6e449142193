// SPDX-License-Identifier: GPL-2.0-only
/*
 * QEMU TCG plugin: what runs between two marks of the guest.
 *
 * The guest program executes "hint #0x70" at EL0 to begin a section and "hint
 * #0x71" to end it (NOPs to the architecture).  For each section a line of
 * numbers in the order of enum count is written.  Needs one vCPU.
 *
 * - The exception level is taken from bit 55 of the PC.
 * - An instruction that faults and is run again counts twice.
 * - Loads and stores are accesses of EL1: LDP is two, an atomic one of each;
 *   DC ZVA is none.
 *
 * Arguments: out=FILE; symbols=FILE for a line "section pc count" for each
 * EL1 PC, see profile.
 *
 * Debian 12 has no package with qemu-plugin.h: declared here is the part in use
 * of the interface of QEMU 7.2 (version 1).
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARK_BEGIN	0x70
#define MARK_END	0x71

/* ---- interface of QEMU ------------------------------------------------- */

typedef uint64_t qemu_id;
struct qemu_tb;
struct qemu_insn;

enum { QEMU_NO_REGS = 0, QEMU_ADD_U64 = 0, QEMU_MEM_RW = 3 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_id id,
		void (*cb)(qemu_id id, struct qemu_tb *tb));
size_t qemu_plugin_tb_n_insns(const struct qemu_tb *tb);
struct qemu_insn *qemu_plugin_tb_get_insn(const struct qemu_tb *tb, size_t i);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_insn *insn);
const void *qemu_plugin_insn_data(const struct qemu_insn *insn);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_insn *insn,
		void (*cb)(unsigned int cpu, void *data), int flags, void *data);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_insn *insn,
		int op, void *ptr, uint64_t imm);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_insn *insn,
		void (*cb)(unsigned int cpu, uint32_t info, uint64_t addr, void *data),
		int flags, int rw, void *data);
bool qemu_plugin_mem_is_store(uint32_t info);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

/* ---- counters ---------------------------------------------------------- */

enum count {
	EL1, EL0, LOAD, STORE,
	TLBI_RANGE, TLBI_VAE, TLBI_VALE, TLBI_ASID, TLBI_ALL, TLBI_OTHER,
	DSB, ISB,
	IRQ,			/* reads of ICC_IAR1_EL1 (GICv3) */
	NR_COUNTS
};

/* The kernel's text has to lie in 64M, aligned. */
#define PCS		(1UL << 24)
#define PC_MASK		(4 * PCS - 1)

static uint64_t count[NR_COUNTS];
static uint64_t *pc_count, pc_base, pc_low = PCS, pc_high;
static unsigned long section;
static FILE *out, *symbols;

static void begin(unsigned int cpu, void *data)
{
	memset(count, 0, sizeof(count));
	if (symbols && pc_low <= pc_high)
		memset(pc_count + pc_low, 0, (pc_high - pc_low + 1) * sizeof(*pc_count));
}

static void end(unsigned int cpu, void *data)
{
	uint64_t i;

	for (i = 0; i < NR_COUNTS; i++)
		fprintf(out, "%" PRIu64 "%c", count[i], i + 1 < NR_COUNTS ? ' ' : '\n');
	fflush(out);
	section++;
	if (!symbols)
		return;
	for (i = pc_low; i <= pc_high; i++)
		if (pc_count[i])
			fprintf(symbols, "%lu %016" PRIx64 " %" PRIu64 "\n", section,
				pc_base + 4 * i, pc_count[i]);
	fflush(symbols);
}

static void access(unsigned int cpu, uint32_t info, uint64_t addr, void *data)
{
	count[qemu_plugin_mem_is_store(info) ? STORE : LOAD]++;
}

/* The counter that this instruction has besides EL0 or EL1; NR_COUNTS if none. */
static enum count classify(uint32_t insn)
{
	unsigned int crm = insn >> 8 & 15, op2 = insn >> 5 & 7;

	if ((insn & 0xfffff0ff) == 0xd503309f)
		return DSB;
	if ((insn & 0xfffff0ff) == 0xd50330df)
		return ISB;
	if ((insn & 0xffffffe0) == 0xd538cc00)
		return IRQ;
	if ((insn & 0xfff8f000) != 0xd5088000)		/* SYS with CRn 8 */
		return NR_COUNTS;
	if (insn >> 16 & 7)				/* not of EL1 */
		return TLBI_OTHER;
	if (crm == 2 || crm == 5 || crm == 6)
		return op2 == 1 || op2 == 5 ? TLBI_RANGE : TLBI_OTHER;
	switch (op2) {
	case 0:
		return TLBI_ALL;
	case 1:
		return TLBI_VAE;
	case 2:
		return TLBI_ASID;
	case 5:
		return TLBI_VALE;
	default:
		return TLBI_OTHER;
	}
}

static void add(struct qemu_insn *insn, uint64_t *counter)
{
	qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_ADD_U64, counter, 1);
}

static void count_pc(struct qemu_insn *insn, uint64_t pc)
{
	uint64_t i = (pc & PC_MASK) / 4;

	if (!pc_base)
		pc_base = pc & ~PC_MASK;
	if (pc_base != (pc & ~PC_MASK))
		return;
	pc_low = i < pc_low ? i : pc_low;
	pc_high = i > pc_high ? i : pc_high;
	add(insn, &pc_count[i]);
}

static void translated(qemu_id id, struct qemu_tb *tb)
{
	size_t i, nr = qemu_plugin_tb_n_insns(tb);

	for (i = 0; i < nr; i++) {
		struct qemu_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint64_t pc = qemu_plugin_insn_vaddr(insn);
		bool kernel = pc >> 55 & 1;
		enum count class;
		uint32_t code;

		memcpy(&code, qemu_plugin_insn_data(insn), sizeof(code));
		if (!kernel && code == (0xd503201f | MARK_BEGIN << 5)) {
			qemu_plugin_register_vcpu_insn_exec_cb(insn, begin, QEMU_NO_REGS, NULL);
			continue;
		}
		if (!kernel && code == (0xd503201f | MARK_END << 5)) {
			qemu_plugin_register_vcpu_insn_exec_cb(insn, end, QEMU_NO_REGS, NULL);
			continue;
		}
		add(insn, &count[kernel ? EL1 : EL0]);
		if (!kernel)
			continue;
		class = classify(code);
		if (class != NR_COUNTS)
			add(insn, &count[class]);
		if (symbols)
			count_pc(insn, pc);
		qemu_plugin_register_vcpu_mem_cb(insn, access, QEMU_NO_REGS, QEMU_MEM_RW, NULL);
	}
}

__attribute__((visibility("default")))
int qemu_plugin_install(qemu_id id, const void *info, int argc, char **argv)
{
	int i;

	for (i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "out=", 4))
			out = fopen(argv[i] + 4, "w");
		if (!strncmp(argv[i], "symbols=", 8))
			symbols = fopen(argv[i] + 8, "w");
	}
	pc_count = calloc(PCS, sizeof(*pc_count));
	if (!out || !pc_count)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
