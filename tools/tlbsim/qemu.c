// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the guest does, as QEMU tells it: loads, stores, fetches that reach another
 * page, and the system instructions that have to do with translation.
 *
 * No package of Debian has qemu-plugin.h of QEMU 10: declared here is the part in
 * use of the interface (version 4).  What older ones lack is weak, so that they say
 * themselves that they are too old.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tlbsim.h"

/* ---- interface of QEMU ------------------------------------------------- */

typedef u64 qemu_id;
struct qemu_tb;
struct qemu_insn;
struct qemu_hwaddr;
struct qemu_register;
struct qemu_scoreboard;

struct qemu_u64 {
	struct qemu_scoreboard *score;
	size_t offset;
};

struct qemu_info {
	const char *target_name;
	struct {
		int min, cur;
	} version;
	bool system_emulation;
	struct {
		int smp_vcpus, max_vcpus;
	} system;
};

struct qemu_register_descriptor {
	struct qemu_register *handle;
	const char *name, *feature;
};

/* As GLib has them */
struct byte_array {
	u8 *data;
	unsigned int len;
};

struct array {
	struct qemu_register_descriptor *data;
	unsigned int len;
};

enum { QEMU_NO_REGS, QEMU_READS_REGS };
enum { QEMU_MEM_READ = 1, QEMU_MEM_WRITE = 2 };
enum { QEMU_COND_NOT_EQUAL = 3 };

typedef void (*vcpu_cb)(unsigned int cpu, void *data);
typedef void (*mem_cb)(unsigned int cpu, u32 info, u64 addr, void *data);

void qemu_plugin_register_vcpu_init_cb(qemu_id id, void (*cb)(qemu_id id, unsigned int cpu));
void qemu_plugin_register_atexit_cb(qemu_id id, void (*cb)(qemu_id id, void *data), void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_id id, void (*cb)(qemu_id id, struct qemu_tb *tb));
u64 qemu_plugin_tb_vaddr(const struct qemu_tb *tb);
size_t qemu_plugin_tb_n_insns(const struct qemu_tb *tb);
struct qemu_insn *qemu_plugin_tb_get_insn(const struct qemu_tb *tb, size_t i);
u64 qemu_plugin_insn_vaddr(const struct qemu_insn *insn);
size_t qemu_plugin_insn_data(const struct qemu_insn *insn, void *dest, size_t len);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_insn *insn, vcpu_cb cb, int flags,
					    void *data);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_insn *insn, mem_cb cb, int flags, int rw,
				      void *data);
unsigned int qemu_plugin_mem_size_shift(u32 info);
struct qemu_hwaddr *qemu_plugin_get_hwaddr(u32 info, u64 addr);
bool qemu_plugin_hwaddr_is_io(const struct qemu_hwaddr *addr);
u64 qemu_plugin_hwaddr_phys_addr(const struct qemu_hwaddr *addr);

#pragma weak qemu_plugin_get_registers
#pragma weak qemu_plugin_read_register
#pragma weak qemu_plugin_scoreboard_new
#pragma weak qemu_plugin_u64_set
#pragma weak qemu_plugin_register_vcpu_tb_exec_cond_cb
struct array *qemu_plugin_get_registers(void);
int qemu_plugin_read_register(struct qemu_register *reg, struct byte_array *buf);
struct qemu_scoreboard *qemu_plugin_scoreboard_new(size_t element_size);
void qemu_plugin_u64_set(struct qemu_u64 entry, unsigned int cpu, u64 value);
void qemu_plugin_register_vcpu_tb_exec_cond_cb(struct qemu_tb *tb, vcpu_cb cb, int flags,
					       int cond, struct qemu_u64 entry, u64 imm,
					       void *data);

struct byte_array *g_byte_array_new(void);
struct byte_array *g_byte_array_set_size(struct byte_array *array, unsigned int length);

__attribute__((visibility("default"))) int qemu_plugin_version = 4;

/* ---- state ------------------------------------------------------------- */

struct options opt = {
	.ram_base = 0x40000000, .entries = 2048, .ways = 4, .seed = 1,
};

struct vcpu vcpus[MAX_CPUS];
unsigned int nr_cpus;
u64 model_time;

/* Guards the model; a vCPU alone looks into its own TLB. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct qemu_register *reg_x[31], *reg_pc;
static __thread struct byte_array *reg_buf;
static struct qemu_u64 fetch_page;
static u64 spsr[MAX_CPUS];
static u64 current[MAX_CPUS];		/* Linux has it in SP_EL0 while in the kernel */

static u64 read_reg(struct qemu_register *reg)
{
	u64 value = 0;

	if (!reg_buf)
		reg_buf = g_byte_array_new();
	g_byte_array_set_size(reg_buf, 0);
	if (qemu_plugin_read_register(reg, reg_buf) == sizeof(value))
		memcpy(&value, reg_buf->data, sizeof(value));
	return value;
}

static u64 read_x(unsigned int nr)
{
	return nr < 31 ? read_reg(reg_x[nr]) : 0;
}

static struct actor actor_here(unsigned int cpu, u64 pc)
{
	return (struct actor) { .cpu = cpu, .pc = pc, .thread = current[cpu] };
}

/* ---- accesses ---------------------------------------------------------- */

/* The top byte is a tag, or says nothing. */
static u64 canonical(u64 va)
{
	return (u64)((int64_t)(va << 8) >> 8);
}

static u64 recent_key(const struct vcpu *v, u64 va)
{
	va &= ~0xfffULL;
	return va >> 55 & 1 ? va : (va | 1) ^ (u64)v->asid << 48;
}

static struct tlb_entry *look_up_slowly(struct vcpu *v, enum side side, u64 va,
					const struct actor *by, bool *filled)
{
	struct recent *r = &v->recent[side][va >> 12 & (RECENT - 1)];
	enum el el = by->pc >> 55 & 1 ? EL1 : EL0;
	struct tlb_entry *e;

	pthread_mutex_lock(&lock);
	e = tlb_access(v, side, el, va, by, filled);
	if (e) {
		r->entry = e;
		r->serial = e->serial;
		r->va = recent_key(v, va);
	}
	pthread_mutex_unlock(&lock);
	return e;
}

static inline struct tlb_entry *look_up(struct vcpu *v, enum side side, u64 va,
					unsigned int cpu, u64 pc, bool *filled)
{
	struct recent *r = &v->recent[side][va >> 12 & (RECENT - 1)];

	*filled = false;
	v->accesses++;
	if (v->marked) {
		pthread_mutex_lock(&lock);
		count_access(v, side, pc >> 55 & 1 ? EL1 : EL0, va);
		pthread_mutex_unlock(&lock);
	}
	if (r->va == recent_key(v, va) && r->entry &&
	    __atomic_load_n(&r->entry->serial, __ATOMIC_RELAXED) == r->serial) {
		r->entry->used = v->accesses;
		return r->entry;
	}
	return look_up_slowly(v, side, va, &(struct actor) { .cpu = cpu, .pc = pc }, filled);
}

static bool qemu_pa(u32 info, u64 va, u64 *pa)
{
	struct qemu_hwaddr *addr = qemu_plugin_get_hwaddr(info, va);

	if (!addr || qemu_plugin_hwaddr_is_io(addr))
		return false;
	*pa = qemu_plugin_hwaddr_phys_addr(addr);
	return true;
}

/* An entry that serves an access leads where QEMU went, or the table has changed since. */
static void compare_with_qemu(struct vcpu *v, const struct tlb_entry *e, u32 info, u64 raw,
			      u64 va)
{
	struct space *s = v->space[va >> 55 & 1];
	struct walk w = { 0 };
	u64 pa;

	if (!qemu_pa(info, raw, &pa) || pa == e->oa + (va - e->va))
		return;
	pthread_mutex_lock(&lock);
	if (s)
		table_walk(s, va, &w);
	if (w.valid && w.oa + (va - w.va) == e->oa + (va - e->va))
		disagreements++;
	else
		raced++;
	pthread_mutex_unlock(&lock);
}

static void on_load(unsigned int cpu, u32 info, u64 raw, void *pc)
{
	struct vcpu *v = &vcpus[cpu];
	u64 va = canonical(raw);
	struct tlb_entry *e;
	bool filled;

	if (!v->mmu)
		return;
	e = look_up(v, DATA, va, cpu, (u64)pc, &filled);
	if (e)
		compare_with_qemu(v, e, info, raw, va);
}

static void on_store(unsigned int cpu, u32 info, u64 raw, void *pc)
{
	struct vcpu *v = &vcpus[cpu];
	u64 va = canonical(raw), pa = va;
	struct frame *f;

	if (v->mmu) {
		bool filled;
		struct tlb_entry *e = look_up(v, DATA, va, cpu, (u64)pc, &filled);

		if (e) {
			pa = e->oa + (va - e->va);
			compare_with_qemu(v, e, info, raw, va);
		} else if (!qemu_pa(info, raw, &pa)) {
			return;
		}
	}
	f = frame_at(pa);
	if (f && (f->tables || f->walkers)) {
		struct actor by = actor_here(cpu, (u64)pc);

		pthread_mutex_lock(&lock);
		table_store(pa, 1 << qemu_plugin_mem_size_shift(info), &by);
		pthread_mutex_unlock(&lock);
	}
}

/* TBs of one page follow each other without this; DATA is what the TB believes. */
static void on_fetch(unsigned int cpu, void *data)
{
	struct vcpu *v = &vcpus[cpu];
	bool filled;
	u64 pc;

	if (!v->mmu)
		return;
	/* A TB is shared by all addresses that its page is mapped at: ask for this one. */
	pc = canonical(read_reg(reg_pc));
	v->el0 = !(pc >> 55 & 1);
	look_up(v, INSN, pc, cpu, pc, &filled);
	qemu_plugin_u64_set(fetch_page, cpu, (u64)data);
}

/* ---- system instructions ----------------------------------------------- */

enum action {
	NOTHING, SYSREG, TLBI, DSB, ERET, ZERO, MARK, HYP,
};

enum sysreg { TTBR0, TTBR1, TCR, SCTLR, VBAR, SPSR, SP_EL0 };

/* What there is to know of an instruction when it runs, in the size of a pointer */
struct insn {
	u64 pc : 49, rt : 5, aux : 7, action : 3;
};

static struct insn decode(u32 code, bool kernel)
{
	static const struct {
		u32 code;
		enum sysreg reg;
	} msr[] = {
		{ 0xd5182000, TTBR0 }, { 0xd5182020, TTBR1 }, { 0xd5182040, TCR },
		{ 0xd5181000, SCTLR }, { 0xd518c000, VBAR }, { 0xd5184000, SPSR },
		{ 0xd5184100, SP_EL0 },
	};
	struct insn insn = { .rt = code & 31 };
	unsigned int i;

	if (code == 0xd5032e1f || code == 0xd5032e3f) {		/* hint #0x70, #0x71 */
		insn.action = MARK;
		insn.aux = code == 0xd5032e3f;
		return insn;
	}
	for (i = 0; i < sizeof(msr) / sizeof(*msr); i++) {
		if ((code & ~31U) == msr[i].code) {
			insn.action = SYSREG;
			insn.aux = msr[i].reg;
		}
	}
	if ((code & 0xfffff0ff) == 0xd503309f) {
		insn.action = DSB;
		insn.aux = code >> 8 & 15;
	} else if ((code & 0xfffff3ff) == 0xd503323f) {		/* DSB nXS */
		insn.action = DSB;
		insn.aux = (code >> 8 & 15) | 3;
	} else if ((code & 0xffffe000) == 0xd5088000) {		/* TLBI of EL1, nXS with CRn 9 */
		insn.action = TLBI;
		insn.aux = code >> 5 & 127;
	} else if (kernel && (code & ~31U) == 0xd50b7420) {	/* DC ZVA */
		insn.action = ZERO;
	} else if (code == 0xd69f03e0 || (code & 0xfffffbff) == 0xd69f0bff) {
		insn.action = ERET;
	} else if ((code & ~31U) == 0xd51c1000) {		/* SCTLR_EL2 */
		insn.action = HYP;
	}
	return insn;
}

static void translation_changed(unsigned int cpu)
{
	struct vcpu *v = &vcpus[cpu];
	unsigned int a1 = v->tcr >> 22 & 1, which;

	v->asid = v->ttbr[a1] >> 48 & (v->tcr >> 36 & 1 ? 0xffff : 0xff);
	if (!v->mmu)
		return;
	for (which = 0; which < 2; which++) {
		/* TCR.EPD: no walks through this TTBR */
		if (v->tcr >> (which ? 23 : 7) & 1 || !regime_of(v->tcr, which, &v->regime[which]))
			v->regime[which].shift = 0;
		space_load(cpu, which, v->ttbr[which] & ROOT_MASK, v->asid);
	}
	if (v->space[0])
		v->asid = v->space[0]->asid;
	qemu_plugin_u64_set(fetch_page, cpu, 0);
}

static void on_sysreg(unsigned int cpu, enum sysreg reg, u64 value)
{
	struct vcpu *v = &vcpus[cpu];
	bool was_on = v->mmu;

	switch (reg) {
	case TTBR0:
	case TTBR1:
		v->ttbr[reg == TTBR1] = value;
		break;
	case TCR:
		if (value >> 59 & 1)
			give_up("the guest uses LPA2: start QEMU with -cpu max,lpa2=off");
		v->tcr = value;
		break;
	case SCTLR:
		v->mmu = value & 1;
		break;
	case VBAR:
		symbols_slide(value);
		return;
	case SPSR:
		spsr[cpu] = value;
		return;
	case SP_EL0:
		/* Before it goes back, a program's stack pointer */
		if (value >> 55 & 1)
			current[cpu] = value;
		return;
	}
	translation_changed(cpu);
	if (v->mmu && !was_on && !v->space[0] && !v->space[1])
		give_up("the page tables are empty: is %s the guest's memory, with share=on?",
			opt.ram[0]);
}

static void on_tlbi(unsigned int cpu, unsigned int crm, unsigned int op2, u64 x)
{
	static const unsigned int tg[] = { 0, 12, 14, 16 };
	struct tlbi op = { .asid = x >> 48, .any_asid = op2 == 0 || op2 == 3 || op2 == 7 };
	struct counts *c = &vcpus[cpu].counts;
	enum tlbi_kind kind;

	if (crm > 7 || crm == 0 || crm == 4)
		return;
	op.last_level = op2 == 5 || op2 == 7;
	op.local = crm >= 6;
	if (crm == 2 || crm == 5 || crm == 6) {
		unsigned int shift = tg[x >> 46 & 3];

		if (!shift)
			return;
		op.va = (u64)((int64_t)(x << 27) >> 27) << shift;
		op.size = ((x >> 39 & 31) + 1) << (5 * (x >> 44 & 3) + 1 + shift);
		op.level = x >> 37 & 3;
		kind = TLBI_RANGE;
	} else if (op2 == 0 || op2 == 2) {
		kind = op2 ? TLBI_ASID : TLBI_ALL;
	} else {
		op.va = canonical(x << 12);
		op.size = 4096;
		op.level = x >> 46 & 3 ? x >> 44 & 3 : 0;
		kind = op.last_level ? TLBI_VA_LAST : TLBI_VA;
	}
	op.kernel = op.va >> 55 & 1;
	c->tlbi[kind]++;
	if (op.local)
		c->tlbi[TLBI_LOCAL]++;
	if (op.kernel && op.size)
		tables_catch_up(op.va);
	tlbi_issue(cpu, &op);
}

static void on_zero(unsigned int cpu, const struct actor *by, u64 va)
{
	struct vcpu *v = &vcpus[cpu];
	struct tlb_entry *e;
	struct frame *f;
	bool filled;
	u64 pa;

	if (!v->mmu)
		return;
	e = tlb_access(v, DATA, EL1, canonical(va), by, &filled);
	if (!e)
		return;
	pa = e->oa + (canonical(va) - e->va);
	f = frame_at(pa);
	if (f && f->ghosts)
		ghosts_of_frame_reused(f, pa, "is cleared", by);
}

static void on_insn(unsigned int cpu, void *data)
{
	struct actor by;
	struct insn insn;

	memcpy(&insn, &data, sizeof(insn));
	by = actor_here(cpu, insn.pc | (insn.pc >> 48 ? 0xffffULL << 48 : 0));
	/* What is frequent and concerns only this vCPU goes without the lock. */
	if (insn.action == ERET && (!ghosts_outstanding() || spsr[cpu] & 15))
		return;
	if (insn.action == SYSREG && (insn.aux == SPSR || insn.aux == SP_EL0)) {
		on_sysreg(cpu, insn.aux, read_x(insn.rt));
		return;
	}
	if (insn.action == ZERO && read_x(insn.rt) & 0xfff)
		return;
	if (insn.action == DSB) {
		vcpus[cpu].counts.dsb++;
		/* bits 1 and 0: 1 loads, 2 stores, 3 both */
		if ((insn.aux & 3) != 3 || !vcpus[cpu].nr_pending) {
			if (insn.aux & 2)
				dsb_stores(cpu);
			return;
		}
	}
	pthread_mutex_lock(&lock);
	switch ((enum action)insn.action) {
	case SYSREG:
		on_sysreg(cpu, insn.aux, read_x(insn.rt));
		break;
	case TLBI:
		on_tlbi(cpu, insn.aux >> 3, insn.aux & 7, read_x(insn.rt));
		break;
	case DSB:
		dsb_completes(cpu);
		qemu_plugin_u64_set(fetch_page, cpu, 0);
		break;
	case ERET:
		ghosts_program_runs(cpu);
		ghosts_thread_returns(&by);
		break;
	case ZERO:
		on_zero(cpu, &by, read_x(insn.rt));
		break;
	case MARK:
		if (!insn.aux)
			count_begin(cpu);
		else
			count_end(cpu);
		break;
	case HYP:
		give_up("the guest runs at EL2: start QEMU without virtualization=on");
	case NOTHING:
		break;
	}
	pthread_mutex_unlock(&lock);
}

/* ---- translation ------------------------------------------------------- */

static void translated(qemu_id id, struct qemu_tb *tb)
{
	size_t i, nr = qemu_plugin_tb_n_insns(tb);
	u64 page = qemu_plugin_tb_vaddr(tb) >> 12;

	(void)id;
	qemu_plugin_register_vcpu_tb_exec_cond_cb(tb, on_fetch, QEMU_READS_REGS,
						  QEMU_COND_NOT_EQUAL, fetch_page, page,
						  (void *)page);
	for (i = 0; i < nr; i++) {
		struct qemu_insn *q = qemu_plugin_tb_get_insn(tb, i);
		u64 pc = qemu_plugin_insn_vaddr(q);
		struct insn insn;
		void *data;
		u32 code;

		qemu_plugin_insn_data(q, &code, sizeof(code));
		insn = decode(code, pc >> 55 & 1);
		if (insn.action != NOTHING) {
			insn.pc = pc & ((1ULL << 49) - 1);
			memcpy(&data, &insn, sizeof(data));
			qemu_plugin_register_vcpu_insn_exec_cb(q, on_insn, QEMU_READS_REGS, data);
		}
		qemu_plugin_register_vcpu_mem_cb(q, on_load, QEMU_NO_REGS, QEMU_MEM_READ,
						 (void *)pc);
		qemu_plugin_register_vcpu_mem_cb(q, on_store, QEMU_NO_REGS, QEMU_MEM_WRITE,
						 (void *)pc);
	}
}

static void vcpu_starts(qemu_id id, unsigned int cpu)
{
	struct array *regs = qemu_plugin_get_registers();
	unsigned int i, nr;

	(void)id;
	(void)cpu;
	for (i = 0; i < regs->len; i++) {
		const char *name = regs->data[i].name;

		if (name[0] == 'x' && sscanf(name, "x%u", &nr) == 1 && nr < 31)
			reg_x[nr] = regs->data[i].handle;
		else if (!strcmp(name, "pc"))
			reg_pc = regs->data[i].handle;
	}
	if (!reg_pc || !reg_x[30])
		give_up("this QEMU does not show the registers that are needed");
}

static void ends(qemu_id id, void *data)
{
	(void)id;
	(void)data;
	pthread_mutex_lock(&lock);
	summary();
	pthread_mutex_unlock(&lock);
}

/* ---- start ------------------------------------------------------------- */

static bool number(const char *arg, const char *name, u64 *value)
{
	size_t len = strlen(name);
	char *end;

	if (strncmp(arg, name, len) || arg[len] != '=')
		return false;
	*value = strtoull(arg + len + 1, &end, 0);
	if (end == arg + len + 1 || *end)
		give_up("%s takes a number, not '%s'", name, arg + len + 1);
	return true;
}

static void option(const char *arg)
{
	u64 value;

	if (!strncmp(arg, "ram=", 4)) {
		if (opt.nr_ram == sizeof(opt.ram) / sizeof(*opt.ram))
			give_up("too many files for ram=");
		opt.ram[opt.nr_ram++] = arg + 4;
	} else if (!strncmp(arg, "symbols=", 8)) {
		opt.symbols = arg + 8;
	} else if (!strncmp(arg, "out=", 4)) {
		if (!out_open(arg + 4))
			give_up("cannot write %s", arg + 4);
	} else if (number(arg, "base", &value)) {
		opt.ram_base = value;
	} else if (number(arg, "entries", &value)) {
		opt.entries = value;
	} else if (number(arg, "ways", &value)) {
		opt.ways = value;
	} else if (number(arg, "seed", &value)) {
		opt.seed = value;
	} else if (number(arg, "repeat", &value)) {
		opt.repeat = value;
	} else {
		give_up("unknown option '%s'", arg);
	}
}

__attribute__((visibility("default")))
int qemu_plugin_install(qemu_id id, const struct qemu_info *info, int argc, char **argv)
{
	int i;

	if (!qemu_plugin_register_vcpu_tb_exec_cond_cb || !qemu_plugin_read_register)
		give_up("this needs QEMU 10");
	if (strcmp(info->target_name, "aarch64") || !info->system_emulation)
		give_up("this is for qemu-system-aarch64");
	out_open(NULL);
	for (i = 0; i < argc; i++)
		option(argv[i]);
	if (!opt.nr_ram)
		give_up("ram=FILE is missing: the file of -object memory-backend-file,share=on");
	if (!ram_open())
		give_up("cannot map the guest's memory, %s", opt.ram[opt.nr_ram - 1]);
	if (!opt.entries || opt.entries > 1 << 20 || (opt.ways && opt.entries % opt.ways))
		give_up("entries is to be a multiple of ways, and at most %u", 1 << 20);
	if (opt.symbols && !symbols_load(opt.symbols))
		give_up("no symbols in %s", opt.symbols);
	nr_cpus = info->system.max_vcpus;
	if (nr_cpus > MAX_CPUS)
		give_up("more than %u vCPUs", MAX_CPUS);
	tlbs_init();
	fetch_page.score = qemu_plugin_scoreboard_new(sizeof(u64));
	qemu_plugin_register_vcpu_init_cb(id, vcpu_starts);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ends, NULL);
	return 0;
}
