/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A model of the TLBs and walk caches of arm64, and a checker of what a kernel
 * does with its page tables.
 *
 *   qemu.c    what the guest does: accesses, system instructions; QEMU's interface
 *   tables.c  the page tables in the guest's memory, and every change of them
 *   ghosts.c  what a TLB may still hold of what is gone, and TLBIs
 *   tlb.c     a TLB of a given size for each vCPU, and the counts
 *   report.c  symbols, reports, and the summary
 */
#ifndef TLBSIM_H
#define TLBSIM_H

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define MAX_CPUS	32

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;

/* ---- descriptors ------------------------------------------------------- */

#define DESC_VALID	(1ULL << 0)
#define DESC_TABLE	(1ULL << 1)	/* a page at level 3, else a table */
#define DESC_ATTR	(0xfULL << 2 | 3ULL << 8 | 1ULL << 50)	/* AttrIndx, NS, SH, GP */
#define DESC_USER	(1ULL << 6)	/* AP[1] */
#define DESC_RDONLY	(1ULL << 7)	/* AP[2] */
#define DESC_AF		(1ULL << 10)
#define DESC_NG		(1ULL << 11)
#define DESC_DBM	(1ULL << 51)
#define DESC_CONT	(1ULL << 52)
#define DESC_PXN	(1ULL << 53)
#define DESC_UXN	(1ULL << 54)
#define ADDR_MASK	0x0000fffffffff000ULL
#define ROOT_MASK	0x0000fffffffffff0ULL	/* of a TTBR: small roots share a page */

/* ---- what is known of the guest ---------------------------------------- */

struct options {
	const char *ram[4];		/* files, one after the other from ram_base */
	unsigned int nr_ram;
	const char *symbols;
	u64 ram_base;
	unsigned int entries, ways;	/* of a TLB; ways == 0: fully associative */
	u64 seed;
	u64 repeat;			/* a broadcast TLBI takes another, and its DSB */
};

extern struct options opt;

/* How the addresses of a TTBR are translated; shift == 0: not known yet */
struct regime {
	unsigned int shift;		/* of a page */
	unsigned int stride;		/* bits that a level resolves */
	unsigned int va_bits;
	unsigned int start;		/* level of the root */
};

/* The root of a tree, and what may be cached of it */
struct space {
	u64 root;			/* physical */
	unsigned int asid;
	bool kernel;			/* TTBR1's */
	struct regime regime;
	u32 loaded;			/* vCPUs that have it in a TTBR now */
	u32 maybe;			/* vCPUs that may hold entries of it */
	struct ghost *ghosts;
	unsigned long nr_ghosts;
	struct table *table;
	struct space *next;
};

/* A table that can be reached from a space */
struct table {
	u64 pa, va;
	unsigned int level, nr;		/* entries */
	struct space *space;
	struct table *parent;
	struct table *next_in_frame;	/* small roots share a page */
	u64 *writer;			/* of each entry: PC, vCPU in the top byte */
	u64 desc[];			/* as it was last seen */
};

/* A 4K page of the guest's memory */
struct frame {
	struct table *tables;
	u32 ghosts;			/* of translations to this page */
	u32 walkers;			/* ghosts of tables that this page was */
};

/* ---- per vCPU ---------------------------------------------------------- */

struct tlb_entry {
	u64 serial;			/* 0: not valid; else like no other's */
	u64 va, size, oa, desc;
	u64 used;
	unsigned int asid;
	bool global, stale;
};

struct tlb {
	struct tlb_entry *entries;
	unsigned int sets, ways;
	bool hint;			/* whether it makes use of the contiguous hint */
};

/* The last entry that served a page: found without a search */
struct recent {
	struct tlb_entry *entry;
	u64 va, serial;			/* va: of the page, and the ASID */
};

#define RECENT	1024
#define NR_WALKS 32			/* entries of a walk cache */

struct walk_entry {
	u64 va;
	u64 size;			/* 0: not valid */
	unsigned int asid;
	bool kernel;
};

/* A TLBI that waits for its DSB */
struct tlbi {
	u64 va, size;			/* size 0: all addresses */
	unsigned int asid;
	unsigned int level;		/* of the leaf, if the TTL hint says so; else 0 */
	bool any_asid, last_level, local, kernel;
	u64 waited_for;			/* when a DSB did; 0: not yet. See dsb_completes() */
	u64 after;			/* covers what this vCPU wrote before */
	u64 issued;
};

enum side { DATA, INSN, NR_SIDES };
enum el { EL0, EL1, NR_ELS };

struct counts {
	u64 access[NR_ELS][NR_SIDES];
	u64 miss[NR_ELS][NR_SIDES];
	u64 miss_no_hint[NR_ELS][NR_SIDES];
	u64 walk_miss[NR_ELS];
	u64 tlbi[6];			/* see enum tlbi_kind */
	u64 dsb;
};

enum tlbi_kind { TLBI_VA, TLBI_VA_LAST, TLBI_RANGE, TLBI_ASID, TLBI_ALL, TLBI_LOCAL, NR_TLBI };

struct vcpu {
	bool mmu;
	bool el0;			/* runs a program */
	u64 ttbr[2], tcr;
	unsigned int asid;
	struct regime regime[2];
	struct space *space[2];
	struct tlb tlb[NR_SIDES], no_hint[NR_SIDES];
	struct recent recent[NR_SIDES][RECENT];
	struct walk_entry walks[NR_WALKS];
	unsigned int next_walk;
	struct tlbi *pending;
	unsigned int nr_pending, max_pending;
	u64 last_dsb;			/* when, in model_time */
	u64 accesses;
	bool marked;			/* between the marks of the guest's program */
	struct counts counts;
	u64 random;
};

extern struct vcpu vcpus[MAX_CPUS];
extern unsigned int nr_cpus;
extern u64 model_time;			/* counts changes of tables, and TLBIs */

/* Who does what is being looked at */
struct actor {
	unsigned int cpu;
	u64 pc;
	u64 thread;			/* its task, as Linux names it */
};

/* ---- ghosts ------------------------------------------------------------ */

/* GHOST_AGED: it is still there, but its access flag was cleared. */
enum ghost_kind { GHOST_LEAF, GHOST_PERM, GHOST_TABLE, GHOST_AGED };

/* A translation, or a table, that is gone and that a TLB may still hold */
struct ghost {
	enum ghost_kind kind;
	u64 va, size;			/* the addresses that the entry translates */
	u64 cover;			/* and those that go with it: its CONT block */
	u64 oa, desc;
	unsigned int level;
	u32 cpus;			/* that may hold it */
	u64 time;
	struct actor by;		/* who removed it */
	bool returned;			/* that thread has gone back to EL0 since */
	bool reported;
	const char *reuse;		/* what became of its page, where, and by whom */
	u64 reuse_pa;
	struct actor reuse_by;
	struct space *space;
	struct ghost *next, **pprev;	/* of the space */
	struct ghost *hash_next, **hash_pprev;
};

void ghost_add(struct space *space, enum ghost_kind kind, u64 va, u64 size, u64 cover,
	       unsigned int level, u64 desc, const struct actor *by);
void ghosts_check_new(struct space *space, u64 va, u64 size, unsigned int level, u64 desc,
		      const struct actor *by);
void ghosts_of_frame_reused(struct frame *f, u64 pa, const char *how, const struct actor *by);
void ghosts_of_walker_written(struct frame *f, u64 pa, u64 value, const struct actor *by);
void ghosts_thread_returns(const struct actor *by);
void ghosts_program_runs(unsigned int cpu);
void tlbi_issue(unsigned int cpu, const struct tlbi *op);
void dsb_stores(unsigned int cpu);
void dsb_completes(unsigned int cpu);
bool ghosts_outstanding(void);

/* ---- tables ------------------------------------------------------------ */

struct walk {
	bool valid;
	u64 desc, va, size, oa;		/* of the entry; size without the hint */
	unsigned int level;
	struct table *table;
};

bool ram_open(void);
u64 *ram_at(u64 pa);
struct frame *frame_at(u64 pa);
bool regime_of(u64 tcr, unsigned int which, struct regime *r);
u64 level_size(const struct regime *r, unsigned int level);
u64 cont_size(const struct regime *r, unsigned int level);
bool is_leaf(unsigned int level, u64 desc);
enum change { SAME, RELAXED, TIGHTENED, DIFFERENT };

enum change compare_leaf(u64 old, u64 new);
u64 leaf_oa(const struct regime *r, unsigned int level, u64 desc);
struct space *space_load(unsigned int cpu, unsigned int which, u64 root, unsigned int asid);
void spaces_may_forget(unsigned int cpu, unsigned int asid, bool any_asid, bool local);
struct space *spaces(void);
void table_store(u64 pa, unsigned int bytes, const struct actor *by);
void table_walk(struct space *space, u64 va, struct walk *w);
void tables_catch_up(u64 va);
void block_check_permissions(struct space *s, u64 va, const struct actor *by);

/* ---- TLBs -------------------------------------------------------------- */

void tlbs_init(void);
/* The entry that serves va, NULL if there is no translation now */
struct tlb_entry *tlb_access(struct vcpu *v, enum side side, enum el el, u64 va,
			     const struct actor *by, bool *filled);
void tlbs_invalidate(const struct tlbi *op, unsigned int cpu);
void tlbs_mark_stale(struct space *space, u64 va);
void count_begin(unsigned int cpu);
void count_end(unsigned int cpu);
void count_access(struct vcpu *v, enum side side, enum el el, u64 va);

/* ---- reports ----------------------------------------------------------- */

struct finding {
	const char *kind;		/* BBM, MISPROGRAMMED, STALE, LEAK */
	const char *what;
	u64 va;
	unsigned int asid;
	u64 old, new;
	u64 writer;			/* of the old one, as in struct table */
};

extern u64 disagreements, raced, served_stale;

bool out_open(const char *file);
bool symbols_load(const char *file);
void symbols_slide(u64 vectors);
void report(const struct finding *f, const struct actor *by);
void summary(void);
void out_line(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void give_up(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));

/* As in struct table */
static inline u64 writer_of(const struct actor *by)
{
	return (by->pc & ~(0xffULL << 56)) | (u64)by->cpu << 56;
}

#endif
