// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a TLB may still hold: the architecture lets it keep, and load by
 * speculation, whatever was valid since the last invalidation.  So each entry that
 * is removed or changed while its address space may be in use leaves a ghost, which
 * goes when a TLBI that covers it is complete: at the DSB of the vCPU that issued
 * it, and only for what that vCPU wrote before the DSB that preceded the TLBI.
 */
#include <stdlib.h>
#include <string.h>

#include "tlbsim.h"

#define HASH_SHIFT	21		/* ghosts of more than 2M are kept apart */
#define HASH_SIZE	4096
#define THREADS		4096

static struct ghost *hash[HASH_SIZE], *big;
static unsigned long nr_user, nr_reused;
static u32 of_thread[THREADS];		/* user ghosts whose remover is still in the kernel */

static unsigned int thread_slot(u64 thread)
{
	return thread / 64 % THREADS;
}

static struct ghost **bucket(u64 va)
{
	va >>= HASH_SHIFT;
	return &hash[(va ^ va >> 12) % HASH_SIZE];
}

bool ghosts_outstanding(void)
{
	return __atomic_load_n(&nr_user, __ATOMIC_RELAXED) ||
		__atomic_load_n(&nr_reused, __ATOMIC_RELAXED);
}

static bool counts_for_thread(const struct ghost *g)
{
	return !g->space->kernel && !g->returned;
}

/* The pages that are reached through a ghost know how many there are. */
static void count_frames(const struct ghost *g, int add)
{
	u64 oa, bytes = g->kind == GHOST_TABLE ? 1ULL << g->space->regime.shift : g->size;

	if (g->kind == GHOST_PERM || g->kind == GHOST_AGED)
		return;
	for (oa = g->oa; oa < g->oa + bytes; oa += 4096) {
		struct frame *f = frame_at(oa);

		if (!f)
			return;
		if (g->kind == GHOST_TABLE)
			f->walkers += add;
		else
			f->ghosts += add;
	}
}

/* Ends the search if it returns true. */
typedef bool (*overlap_fn)(struct ghost *g, void *data);

/* Call FN for the ghosts that have to do with these addresses. */
static void for_each_overlap(struct space *s, u64 va, u64 size, overlap_fn fn, void *data)
{
	struct ghost *g, *next, **head, **last;

	if (!s->ghosts)
		return;
	if (size > 1ULL << HASH_SHIFT) {
		for (g = s->ghosts; g; g = next) {
			next = g->next;
			if (g->va < va + size && va < g->va + g->size && fn(g, data))
				return;
		}
		return;
	}
	last = bucket(va + size - 1);
	for (head = bucket(va); head; head = head == &big ? NULL : head == last ? &big : last) {
		for (g = *head; g; g = next) {
			next = g->hash_next;
			if (g->space == s && g->va < va + size && va < g->va + g->size &&
			    fn(g, data))
				return;
		}
	}
}

static bool is_aged(struct ghost *g, void *data)
{
	return *(bool *)data = g->kind == GHOST_AGED;
}

void ghost_add(struct space *space, enum ghost_kind kind, u64 va, u64 size, u64 cover,
	       unsigned int level, u64 desc, const struct actor *by)
{
	struct ghost *g, **head;

	if (!space->maybe)
		return;
	if (kind == GHOST_AGED) {
		bool known = false;

		for_each_overlap(space, va, size, is_aged, &known);
		if (known)
			return;
	}
	g = calloc(1, sizeof(*g));
	if (!g)
		give_up("no memory for what TLBs may hold");
	g->kind = kind;
	g->va = va;
	g->size = size;
	g->cover = cover;
	g->level = level;
	g->desc = desc;
	g->oa = kind == GHOST_TABLE ? desc & ADDR_MASK & ~((1ULL << space->regime.shift) - 1) :
		leaf_oa(&space->regime, level, desc);
	g->cpus = space->maybe;
	g->time = ++model_time;
	g->by = *by;
	g->returned = kind == GHOST_AGED;
	g->space = space;

	g->next = space->ghosts;
	g->pprev = &space->ghosts;
	if (g->next)
		g->next->pprev = &g->next;
	space->ghosts = g;
	space->nr_ghosts++;

	head = size <= 1ULL << HASH_SHIFT ? bucket(va) : &big;
	g->hash_next = *head;
	g->hash_pprev = head;
	if (g->hash_next)
		g->hash_next->hash_pprev = &g->hash_next;
	*head = g;

	if (counts_for_thread(g)) {
		nr_user++;
		of_thread[thread_slot(by->thread)]++;
	}
	count_frames(g, 1);
	if (kind == GHOST_LEAF || kind == GHOST_PERM)
		tlbs_mark_stale(space, va);
}

static void ghost_returned(struct ghost *g)
{
	if (counts_for_thread(g)) {
		nr_user--;
		of_thread[thread_slot(g->by.thread)]--;
	}
	g->returned = true;
}

static void ghost_drop(struct ghost *g)
{
	ghost_returned(g);
	nr_reused -= !!g->reuse;
	count_frames(g, -1);
	*g->pprev = g->next;
	if (g->next)
		g->next->pprev = g->pprev;
	*g->hash_pprev = g->hash_next;
	if (g->hash_next)
		g->hash_next->hash_pprev = g->hash_pprev;
	g->space->nr_ghosts--;
	free(g);
}

/* ---- a new entry ------------------------------------------------------- */

struct newcomer {
	u64 va, size, desc, own_va;
	unsigned int level;
	const struct actor *by;
};

/* How a ghost and a new entry differ, NULL if they may both be */
static const char *conflict(const struct ghost *g, const struct newcomer *n, bool yet)
{
	const struct regime *r = &g->space->regime;

	if (g->kind == GHOST_PERM)
		return NULL;
	if (g->kind == GHOST_TABLE) {
		if (g->level != n->level)
			return NULL;
		if (is_leaf(n->level, n->desc))
			return yet ? "a block for a table, not yet invalidated" :
				     "a block for a table, not invalidated";
		if ((g->desc ^ n->desc) & ADDR_MASK)
			return yet ? "another table, not yet invalidated" :
				     "another table, not invalidated";
		return NULL;
	}
	if (!is_leaf(n->level, n->desc)) {
		if (g->level > n->level)
			return NULL;
		return yet ? "a table for a block, not yet invalidated" :
			     "a table for a block, not invalidated";
	}
	if (g->level != n->level || (g->desc ^ n->desc) & DESC_CONT)
		return yet ? "another size, not yet invalidated" : "another size, not invalidated";
	if (leaf_oa(r, n->level, n->desc) - n->own_va != g->oa - g->va)
		return yet ? "another address, not yet invalidated" :
			     "another address, not invalidated";
	if ((g->desc ^ n->desc) & (DESC_ATTR | DESC_NG))
		return yet ? "other attributes, not yet invalidated" :
			     "other attributes, not invalidated";
	return NULL;
}

/* What was cleared is there again: only a permission may be gone, or nothing. */
static void came_back(struct ghost *g, const struct newcomer *n)
{
	enum change change;

	if ((g->kind != GHOST_LEAF && g->kind != GHOST_AGED) || g->va != n->own_va ||
	    g->level != n->level)
		return;
	change = compare_leaf(g->desc, n->desc);
	if (change == TIGHTENED && g->kind == GHOST_LEAF) {
		count_frames(g, -1);
		g->kind = GHOST_PERM;
	} else if (change != DIFFERENT) {
		ghost_drop(g);
	}
}

/* "Yet": another thread fills what one has cleared and is about to have invalidated. */
static bool check_one(struct ghost *g, void *data)
{
	const struct newcomer *n = data;
	bool yet = counts_for_thread(g) && g->by.thread != n->by->thread;
	struct finding f = {
		.kind = "BBM", .va = n->own_va, .asid = g->space->asid, .old = g->desc,
		.new = n->desc, .writer = writer_of(&g->by),
		.what = g->reported ? NULL : conflict(g, n, yet),
	};

	if (!f.what) {
		came_back(g, n);
		return false;
	}
	g->reported = true;
	report(&f, n->by);
	return true;
}

/* A valid entry appears: no TLB may hold another one for its addresses. */
void ghosts_check_new(struct space *space, u64 va, u64 size, unsigned int level, u64 desc,
		      const struct actor *by)
{
	struct newcomer n = {
		.va = va, .size = size, .own_va = va, .desc = desc,
		.level = level, .by = by,
	};

	if (is_leaf(level, desc) && (desc & DESC_CONT)) {
		n.size = cont_size(&space->regime, level);
		n.va &= ~(n.size - 1);
	}
	for_each_overlap(space, n.va, n.size, check_one, &n);
}

/* ---- reuse ------------------------------------------------------------- */

/* An entry that is not valid, and not empty either, is about to be valid again. */
static bool still_in_use(const struct ghost *g)
{
	struct walk w;

	table_walk(g->space, g->va, &w);
	return w.desc;
}

static void report_reuse(struct ghost *g)
{
	struct finding f = {
		.kind = "LEAK", .what = g->reuse, .va = g->va, .asid = g->space->asid,
		.old = g->desc, .new = g->reuse_pa, .writer = writer_of(&g->by),
	};

	g->reported = true;
	report(&f, &g->reuse_by);
}

static bool program_runs(const struct ghost *g)
{
	unsigned int cpu;

	for (cpu = 0; cpu < nr_cpus; cpu++)
		if (g->cpus >> cpu & 1 && vcpus[cpu].el0 && vcpus[cpu].space[0] == g->space)
			return true;
	return false;
}

/*
 * A page is cleared, or becomes a table, while a TLB may lead there.  A kernel that
 * takes a whole address space down frees pages before it flushes, once no program
 * can run in it: so it counts when one runs, now or later.  It frees what vunmap()
 * unmaps long before it flushes: so a kernel address counts if it is in use again.
 */
void ghosts_of_frame_reused(struct frame *f, u64 pa, const char *how, const struct actor *by)
{
	struct space *s;
	struct ghost *g;

	for (s = spaces(); s && f->ghosts; s = s->next) {
		for (g = s->ghosts; g; g = g->next) {
			if (g->kind != GHOST_LEAF || g->reported || pa - g->oa >= g->size)
				continue;
			nr_reused += !g->reuse;
			g->reuse = how;
			g->reuse_pa = pa;
			g->reuse_by = *by;
			if (s->kernel ? still_in_use(g) : program_runs(g))
				report_reuse(g);
		}
	}
}

void ghosts_program_runs(unsigned int cpu)
{
	struct space *s = vcpus[cpu].space[0];
	struct ghost *g;

	for (g = s && nr_reused ? s->ghosts : NULL; g; g = g->next)
		if (g->reuse && !g->reported && g->cpus >> cpu & 1)
			report_reuse(g);
}

/* A page that was a table is written while a walk cache may lead there. */
void ghosts_of_walker_written(struct frame *f, u64 pa, u64 value, const struct actor *by)
{
	struct space *s;
	struct ghost *g;

	if (!(value & DESC_VALID))
		return;
	for (s = spaces(); s && f->walkers; s = s->next) {
		for (g = s->ghosts; g; g = g->next) {
			struct finding find = {
				.kind = "STALE",
				.what = "a walk cache may lead to this page, no table now",
				.va = g->va, .asid = s->asid, .old = g->desc, .new = value,
				.writer = writer_of(&g->by),
			};

			if (g->kind != GHOST_TABLE || g->reported ||
			    pa - g->oa >= 1ULL << s->regime.shift)
				continue;
			g->reported = true;
			report(&find, by);
		}
	}
}

/* Whoever removes a translation has it invalidated before it goes back to its program. */
void ghosts_thread_returns(const struct actor *by)
{
	static const char * const what[] = {
		[GHOST_LEAF] = "removed, not invalidated on return to EL0",
		[GHOST_PERM] = "permissions taken, not invalidated on return to EL0",
		[GHOST_TABLE] = "table removed, not invalidated on return to EL0",
	};
	struct space *s;
	struct ghost *g;

	if (!of_thread[thread_slot(by->thread)])
		return;
	for (s = spaces(); s; s = s->next) {
		if (s->kernel)
			continue;
		for (g = s->ghosts; g; g = g->next) {
			struct actor remover = g->by;
			struct finding f = {
				.kind = "STALE", .va = g->va, .asid = s->asid, .old = g->desc,
				.writer = writer_of(&remover),
				.what = what[g->kind],
			};

			if (g->returned || g->by.thread != by->thread)
				continue;
			ghost_returned(g);
			if (g->reported)
				continue;
			g->reported = true;
			report(&f, &remover);
		}
	}
}

/* ---- invalidation ------------------------------------------------------ */

void tlbi_issue(unsigned int cpu, const struct tlbi *op)
{
	struct vcpu *v = &vcpus[cpu];

	if (v->nr_pending == v->max_pending) {
		v->max_pending = v->max_pending ? 2 * v->max_pending : 64;
		v->pending = realloc(v->pending, v->max_pending * sizeof(*v->pending));
		if (!v->pending)
			give_up("no memory for TLBIs that wait for a DSB");
	}
	v->pending[v->nr_pending] = *op;
	v->pending[v->nr_pending].after = v->last_dsb;
	v->pending[v->nr_pending].issued = ++model_time;
	v->pending[v->nr_pending].waited_for = 0;
	v->nr_pending++;
}

struct completion {
	const struct tlbi *op;
	unsigned int cpu;
};

static bool invalidate_one(struct ghost *g, void *data)
{
	const struct completion *c = data;

	if (g->kind == GHOST_TABLE ? c->op->last_level : c->op->level && c->op->level != g->level)
		return false;
	if (g->time > (g->by.cpu == c->cpu ? c->op->after : c->op->issued))
		return false;
	g->cpus &= c->op->local ? ~(1U << c->cpu) : 0;
	if (g->cpus)
		return false;
	if (g->kind == GHOST_PERM && g->cover > g->size)
		block_check_permissions(g->space, g->va, &g->by);
	ghost_drop(g);
	return false;
}

static void complete(const struct tlbi *op, unsigned int cpu)
{
	struct completion c = { .op = op, .cpu = cpu };
	struct space *s;

	tlbs_invalidate(op, cpu);
	for (s = spaces(); s; s = s->next) {
		if (!op->any_asid && !s->kernel && s->asid != op->asid)
			continue;
		if (op->size) {
			if (s->kernel == op->kernel)
				for_each_overlap(s, op->va, op->size, invalidate_one, &c);
		} else if (op->any_asid || !s->kernel) {
			struct ghost *g, *next;

			for (g = s->ghosts; g; g = next) {
				next = g->next;
				invalidate_one(g, &c);
			}
		}
	}
	if (!op->size)
		spaces_may_forget(cpu, op->asid, op->any_asid, op->local);
}

/* A DSB: what this vCPU wrote so far can be seen by walks. */
void dsb_stores(unsigned int cpu)
{
	vcpus[cpu].last_dsb = __atomic_load_n(&model_time, __ATOMIC_RELAXED);
}

/* Those that were waited for before a TLBI that is itself waited for now are complete. */
static void complete_repeated(u64 issued)
{
	unsigned int cpu, i, left;

	for (cpu = 0; cpu < nr_cpus; cpu++) {
		struct vcpu *v = &vcpus[cpu];

		for (i = 0, left = 0; i < v->nr_pending; i++) {
			struct tlbi op = v->pending[i];

			if (op.waited_for && op.waited_for < issued)
				complete(&op, cpu);
			else
				v->pending[left++] = op;
		}
		v->nr_pending = left;
	}
}

/*
 * A DSB of loads and stores: and TLBIs of this vCPU are complete. With opt.repeat they
 * are for other vCPUs only when a TLBI that any vCPU issued after is waited for, too.
 */
void dsb_completes(unsigned int cpu)
{
	struct vcpu *v = &vcpus[cpu];
	unsigned int i, left = 0;
	u64 issued = 0;

	for (i = 0; i < v->nr_pending; i++) {
		struct tlbi op = v->pending[i];

		if (opt.repeat && !op.local) {
			if (!op.waited_for) {
				issued = op.issued;
				v->pending[i].waited_for = ++model_time;
			}
			v->pending[left++] = v->pending[i];
			if (op.waited_for)
				continue;
			op.local = true;
		}
		complete(&op, cpu);
	}
	v->nr_pending = left;
	if (issued)
		complete_repeated(issued);
	dsb_stores(cpu);
}
