// SPDX-License-Identifier: GPL-2.0-only
/*
 * TLBs of a given size, for the counts: one for data and one for instructions in
 * each vCPU, and twins that ignore the contiguous hint.  A DSB of another vCPU takes
 * entries away while this one looks them up; the serial number of an entry says
 * whether it is still the same.
 */
#include <stdlib.h>
#include <string.h>

#include "tlbsim.h"

u64 served_stale;

static u64 serials;

static void tlb_init(struct tlb *t, bool hint)
{
	t->ways = opt.ways ? opt.ways : opt.entries;
	t->sets = opt.entries / t->ways;
	t->hint = hint;
	t->entries = calloc(opt.entries, sizeof(*t->entries));
	if (!t->entries)
		give_up("no memory for a TLB of %u entries", opt.entries);
}

void tlbs_init(void)
{
	unsigned int cpu, side;

	for (cpu = 0; cpu < nr_cpus; cpu++) {
		struct vcpu *v = &vcpus[cpu];

		for (side = 0; side < NR_SIDES; side++) {
			tlb_init(&v->tlb[side], true);
			tlb_init(&v->no_hint[side], false);
		}
		v->random = opt.seed * 0x9e3779b97f4a7c15ULL + cpu + 1;
	}
}

/* xorshift: the same choices for the same seed */
static u64 random_next(struct vcpu *v)
{
	v->random ^= v->random << 13;
	v->random ^= v->random >> 7;
	v->random ^= v->random << 17;
	return v->random;
}

static bool is_kernel(u64 va)
{
	return va >> 55 & 1;
}

static struct tlb_entry *set_of(const struct tlb *t, u64 va, u64 size)
{
	return &t->entries[va / size % t->sets * t->ways];
}

static bool serves(const struct tlb_entry *e, u64 va, unsigned int asid)
{
	return __atomic_load_n(&e->serial, __ATOMIC_ACQUIRE) && va - e->va < e->size &&
		(e->global || e->asid == asid);
}

/* Call with each size that an entry may have; sizes of no use find nothing. */
static u64 next_size(const struct regime *r, u64 size, bool hint)
{
	unsigned int level;

	for (level = 3; level >= 1; level--) {
		u64 plain = level_size(r, level), cont = cont_size(r, level);

		if (size < plain)
			return plain;
		if (hint && size < cont)
			return cont;
	}
	return 0;
}

static struct tlb_entry *tlb_find(const struct tlb *t, const struct regime *r, u64 va,
				  unsigned int asid)
{
	u64 size = 0;
	unsigned int i;

	while ((size = next_size(r, size, t->hint))) {
		struct tlb_entry *set = set_of(t, va, size);

		for (i = 0; i < t->ways; i++)
			if ((t->sets == 1 || set[i].size == size) && serves(&set[i], va, asid))
				return &set[i];
		if (t->sets == 1)
			break;
	}
	return NULL;
}

/* The least recently used entry of the set makes room. */
static struct tlb_entry *tlb_victim(const struct tlb *t, u64 va, u64 size)
{
	struct tlb_entry *set = set_of(t, va, size), *oldest = set;
	unsigned int i;

	for (i = 0; i < t->ways; i++) {
		if (!set[i].serial)
			return &set[i];
		if (set[i].used < oldest->used)
			oldest = &set[i];
	}
	return oldest;
}

/*
 * With the hint one entry serves the whole block, and holds what a table entry of
 * the block said, whichever: a block that disagrees leads elsewhere then.
 */
static struct tlb_entry *tlb_fill(struct vcpu *v, struct tlb *t, const struct space *s, u64 va,
				  const struct walk *w, const struct actor *by)
{
	const struct regime *r = &s->regime;
	struct tlb_entry *e;
	u64 size = w->size, oa = w->oa, desc = w->desc;

	if (t->hint && (desc & DESC_CONT) && w->table) {
		u64 block = cont_size(r, w->level), base = w->va & ~(block - 1);
		u64 slot = random_next(v) % (block / size);
		u64 *p = ram_at(w->table->pa + 8 * ((base - w->table->va) / size + slot));
		u64 other = __atomic_load_n(p, __ATOMIC_RELAXED);

		if (is_leaf(w->level, other) && (other & DESC_AF) && (other & DESC_CONT)) {
			u64 start = leaf_oa(r, w->level, other) - slot * size;

			if (start + (w->va - base) != w->oa && by) {
				struct finding f = {
					.kind = "MISPROGRAMMED", .va = va, .asid = s->asid,
					.old = other, .new = w->desc,
					.what = "the entry that serves the block leads elsewhere",
				};

				report(&f, by);
			}
			oa = start;
			desc = other;
			size = block;
		}
	}
	e = tlb_victim(t, va, size);
	__atomic_store_n(&e->serial, 0, __ATOMIC_RELEASE);
	e->va = va & ~(size - 1);
	e->size = size;
	e->oa = oa;
	e->desc = desc;
	e->asid = s->asid;
	e->global = !(desc & DESC_NG);
	e->stale = false;
	e->used = v->accesses;
	__atomic_store_n(&e->serial, ++serials, __ATOMIC_RELEASE);
	return e;
}

/* Whether the table of the last level was known without a walk from the root */
static bool walk_cache(struct vcpu *v, const struct space *s, const struct walk *w)
{
	u64 size = level_size(&s->regime, w->level ? w->level - 1 : 0);
	unsigned int i;

	for (i = 0; i < NR_WALKS; i++) {
		const struct walk_entry *e = &v->walks[i];

		if (e->size == size && w->va - e->va < size && e->kernel == s->kernel &&
		    (e->kernel || e->asid == s->asid))
			return true;
	}
	v->walks[v->next_walk++ % NR_WALKS] = (struct walk_entry) {
		.va = w->va & ~(size - 1), .size = size, .asid = s->asid, .kernel = s->kernel,
	};
	return false;
}

struct tlb_entry *tlb_access(struct vcpu *v, enum side side, enum el el, u64 va,
			     const struct actor *by, bool *filled)
{
	bool kernel = is_kernel(va);
	struct space *s = v->space[kernel];
	struct tlb *t = &v->tlb[side];
	struct tlb_entry *e;
	struct walk w;

	*filled = false;
	if (!v->regime[kernel].shift)
		return NULL;
	e = tlb_find(t, &v->regime[kernel], va, v->asid);
	if (e) {
		e->used = v->accesses;
		if (e->stale)
			served_stale++;
		return e;
	}
	if (!s || !s->table) {
		/* It was empty when it was loaded, or its page had another owner. */
		s = space_load(by->cpu, kernel, v->ttbr[kernel] & ROOT_MASK, v->asid);
		if (!s)
			return NULL;
	}
	table_walk(s, va, &w);
	if (!w.valid || !(w.desc & DESC_AF)) {
		raced++;
		return NULL;
	}
	v->counts.miss[el][side]++;
	if (!walk_cache(v, s, &w))
		v->counts.walk_miss[el]++;
	*filled = true;
	return tlb_fill(v, t, s, va, &w, by);
}

/* The twin that ignores the hint */
static void count_no_hint(struct vcpu *v, enum side side, enum el el, u64 va)
{
	bool kernel = is_kernel(va);
	struct tlb *t = &v->no_hint[side];
	struct tlb_entry *e = tlb_find(t, &v->regime[kernel], va, v->asid);
	struct walk w;

	if (e) {
		e->used = v->accesses;
		return;
	}
	if (!v->space[kernel] || !v->space[kernel]->table)
		return;
	table_walk(v->space[kernel], va, &w);
	if (!w.valid || !(w.desc & DESC_AF))
		return;
	v->counts.miss_no_hint[el][side]++;
	tlb_fill(v, t, v->space[kernel], va, &w, NULL);
}

void count_access(struct vcpu *v, enum side side, enum el el, u64 va)
{
	v->counts.access[el][side]++;
	count_no_hint(v, side, el, va);
}

/* ---- invalidation ------------------------------------------------------ */

static void entry_drop(struct tlb_entry *e)
{
	__atomic_store_n(&e->serial, 0, __ATOMIC_RELEASE);
}

static void tlb_invalidate(struct tlb *t, const struct tlbi *op)
{
	unsigned int i;

	for (i = 0; i < t->sets * t->ways; i++) {
		struct tlb_entry *e = &t->entries[i];

		if (!e->serial)
			continue;
		if (op->size ? e->va < op->va + op->size && op->va < e->va + e->size &&
		    (op->any_asid || e->global || e->asid == op->asid) :
		    op->any_asid || (!e->global && e->asid == op->asid))
			entry_drop(e);
	}
}

static void walks_invalidate(struct vcpu *v, const struct tlbi *op)
{
	unsigned int i;

	for (i = 0; i < NR_WALKS; i++) {
		struct walk_entry *e = &v->walks[i];

		if (op->size ? e->va < op->va + op->size && op->va < e->va + e->size :
		    op->any_asid || (!e->kernel && e->asid == op->asid))
			e->size = 0;
	}
}

void tlbs_invalidate(const struct tlbi *op, unsigned int cpu)
{
	unsigned int i, side;

	for (i = 0; i < nr_cpus; i++) {
		struct vcpu *v = &vcpus[i];

		if (op->local && i != cpu)
			continue;
		for (side = 0; side < NR_SIDES; side++) {
			tlb_invalidate(&v->tlb[side], op);
			if (v->marked)
				tlb_invalidate(&v->no_hint[side], op);
		}
		if (!op->last_level)
			walks_invalidate(v, op);
	}
}

/* What these addresses lead to has changed: an access finds out, and counts it. */
void tlbs_mark_stale(struct space *s, u64 va)
{
	unsigned int cpu, side;

	for (cpu = 0; cpu < nr_cpus; cpu++) {
		for (side = 0; side < NR_SIDES; side++) {
			struct tlb *t = &vcpus[cpu].tlb[side];
			struct tlb_entry *e = tlb_find(t, &s->regime, va, s->asid);

			if (e) {
				e->stale = true;
				__atomic_store_n(&e->serial, ++serials, __ATOMIC_RELEASE);
			}
		}
	}
}

/* ---- marks of the guest's program -------------------------------------- */

static void tlb_empty(struct tlb *t)
{
	unsigned int i;

	for (i = 0; i < t->sets * t->ways; i++)
		entry_drop(&t->entries[i]);
}

/* From empty TLBs, so that the counts are of this section alone */
void count_begin(unsigned int cpu)
{
	struct vcpu *v = &vcpus[cpu];
	unsigned int side;

	for (side = 0; side < NR_SIDES; side++) {
		tlb_empty(&v->tlb[side]);
		tlb_empty(&v->no_hint[side]);
	}
	memset(v->walks, 0, sizeof(v->walks));
	memset(&v->counts, 0, sizeof(v->counts));
	v->marked = true;
}

void count_end(unsigned int cpu)
{
	struct vcpu *v = &vcpus[cpu];
	const struct counts *c = &v->counts;
	enum el el;

	if (!v->marked)
		return;
	v->marked = false;
	for (el = EL0; el < NR_ELS; el++)
		out_line("count: cpu %u el%u data %" PRIu64 " misses %" PRIu64 " no-hint %" PRIu64
			 " insn-misses %" PRIu64 " no-hint %" PRIu64 " walk-misses %" PRIu64,
			 cpu, el, c->access[el][DATA], c->miss[el][DATA],
			 c->miss_no_hint[el][DATA], c->miss[el][INSN],
			 c->miss_no_hint[el][INSN], c->walk_miss[el]);
	out_line("count: cpu %u tlbi va %" PRIu64 " va-last %" PRIu64 " range %" PRIu64 " asid %"
		 PRIu64 " all %" PRIu64 " local %" PRIu64 " dsb %" PRIu64, cpu,
		 c->tlbi[TLBI_VA], c->tlbi[TLBI_VA_LAST], c->tlbi[TLBI_RANGE],
		 c->tlbi[TLBI_ASID], c->tlbi[TLBI_ALL], c->tlbi[TLBI_LOCAL], c->dsb);
}
