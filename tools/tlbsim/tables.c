// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest's memory, mapped from the file that QEMU has it in, and the page
 * tables in it.  Tables are known from the TTBRs on: each that can be reached has
 * a copy of its entries, and a store to one is compared with the copy.
 *
 * QEMU calls after the store, so another vCPU may have seen the new entry before
 * this model does.  Nothing is lost by it: the order of what one vCPU does stays.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tlbsim.h"

#define FRAME_SHIFT	12

static struct {
	u64 start, size;
	char *map;
} ram[4];

static u64 ram_size;
static struct frame *frames;
static struct space *space_list;

/* ---- memory ------------------------------------------------------------ */

bool ram_open(void)
{
	unsigned int i;

	for (i = 0; i < opt.nr_ram; i++) {
		struct stat st;
		int fd = open(opt.ram[i], O_RDONLY);

		if (fd < 0 || fstat(fd, &st) || !st.st_size)
			return false;
		ram[i].start = opt.ram_base + ram_size;
		ram[i].size = st.st_size;
		ram[i].map = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
		close(fd);
		if (ram[i].map == MAP_FAILED)
			return false;
		ram_size += st.st_size;
	}
	frames = calloc(ram_size >> FRAME_SHIFT, sizeof(*frames));
	return frames;
}

/* Where a word of the guest's memory is, NULL if there is no memory */
u64 *ram_at(u64 pa)
{
	unsigned int i;

	for (i = 0; i < opt.nr_ram; i++)
		if (pa - ram[i].start < ram[i].size)
			return (u64 *)(ram[i].map + (pa - ram[i].start));
	return NULL;
}

struct frame *frame_at(u64 pa)
{
	pa -= opt.ram_base;
	return pa < ram_size ? &frames[pa >> FRAME_SHIFT] : NULL;
}

static u64 read_desc(u64 pa)
{
	u64 *p = ram_at(pa);

	return p ? __atomic_load_n(p, __ATOMIC_RELAXED) : 0;
}

/* ---- descriptors ------------------------------------------------------- */

bool regime_of(u64 tcr, unsigned int which, struct regime *r)
{
	static const unsigned int tg0[] = { 12, 16, 14, 0 }, tg1[] = { 0, 14, 12, 16 };
	unsigned int tsz = tcr >> (which ? 16 : 0) & 63, levels;

	r->shift = which ? tg1[tcr >> 30 & 3] : tg0[tcr >> 14 & 3];
	if (!r->shift || tsz < 12)
		return false;
	r->stride = r->shift - 3;
	r->va_bits = 64 - tsz;
	levels = (r->va_bits - r->shift + r->stride - 1) / r->stride;
	r->start = 4 - levels;
	return levels <= 4;
}

u64 level_size(const struct regime *r, unsigned int level)
{
	return 1ULL << (r->shift + r->stride * (3 - level));
}

u64 cont_size(const struct regime *r, unsigned int level)
{
	unsigned int order = r->shift == 14 && level == 3 ? 7 : r->shift == 12 ? 4 : 5;

	return level_size(r, level) << order;
}

bool is_leaf(unsigned int level, u64 desc)
{
	return (desc & DESC_VALID) && !(desc & DESC_TABLE) == (level < 3);
}

static bool is_table(unsigned int level, u64 desc)
{
	return level < 3 && (desc & (DESC_VALID | DESC_TABLE)) == (DESC_VALID | DESC_TABLE);
}

u64 leaf_oa(const struct regime *r, unsigned int level, u64 desc)
{
	return desc & ADDR_MASK & ~(level_size(r, level) - 1);
}

static u64 table_pa(const struct regime *r, u64 desc)
{
	return desc & ADDR_MASK & ~((1ULL << r->shift) - 1);
}

/* What becomes of a leaf entry; the access flag makes no difference */
enum change compare_leaf(u64 old, u64 new)
{
	const u64 gives = DESC_USER, takes = DESC_RDONLY | DESC_PXN | DESC_UXN;

	if ((old ^ new) & (ADDR_MASK | DESC_CONT | DESC_ATTR | DESC_NG))
		return DIFFERENT;
	if ((old & ~new & gives) | (new & ~old & takes))
		return TIGHTENED;
	return (old ^ new) & (gives | takes) ? RELAXED : SAME;
}

/* ---- trees ------------------------------------------------------------- */

struct space *spaces(void)
{
	return space_list;
}

static u64 table_bytes(const struct table *t)
{
	return t->nr * sizeof(u64);
}

static struct table *table_find(u64 pa)
{
	struct frame *f = frame_at(pa);
	struct table *t = f ? f->tables : NULL;

	while (t && t->pa != pa)
		t = t->next_in_frame;
	return t;
}

/* Each 4K of a table knows it; small roots share their 4K. */
static void table_publish(struct table *t)
{
	u64 pa;

	for (pa = t->pa; pa < t->pa + table_bytes(t); pa += 1 << FRAME_SHIFT) {
		struct frame *f = frame_at(pa);

		if (pa == t->pa)
			t->next_in_frame = f->tables;
		f->tables = t;
	}
}

static void table_forget(struct table *t)
{
	u64 pa;

	for (pa = t->pa; pa < t->pa + table_bytes(t); pa += 1 << FRAME_SHIFT) {
		struct table **p = &frame_at(pa)->tables;

		if (pa != t->pa) {
			*p = NULL;
			continue;
		}
		while (*p && *p != t)
			p = &(*p)->next_in_frame;
		if (*p)
			*p = t->next_in_frame;
	}
	free(t->writer);
	free(t);
}

static struct table *table_link(struct space *s, struct table *parent, u64 pa, u64 va,
				unsigned int level)
{
	const struct regime *r = &s->regime;
	unsigned int nr = 1 << r->stride, i;
	struct table *t = table_find(pa);

	if (!frame_at(pa) || t)
		return t;
	if (level == r->start)
		nr = 1 << (r->va_bits - r->shift - r->stride * (3 - level));
	t = calloc(1, sizeof(*t) + nr * sizeof(u64));
	if (t)
		t->writer = calloc(nr, sizeof(u64));
	if (!t || !t->writer)
		give_up("no memory for the copy of a page table");
	t->pa = pa;
	t->va = va;
	t->level = level;
	t->nr = nr;
	t->space = s;
	t->parent = parent;
	table_publish(t);
	for (i = 0; i < nr; i++) {
		t->desc[i] = read_desc(pa + i * sizeof(u64));
		if (is_table(level, t->desc[i]))
			table_link(s, t, table_pa(r, t->desc[i]), va + i * level_size(r, level),
				   level + 1);
	}
	return t;
}

/*
 * Forget a table and what is below it.  With BY it was taken out of a live tree:
 * what was valid in it may be cached.
 */
static void table_unlink(struct table *t, const struct actor *by)
{
	const struct regime *r = &t->space->regime;
	u64 size = level_size(r, t->level);
	unsigned int i;

	for (i = 0; i < t->nr; i++) {
		u64 desc = t->desc[i], va = t->va + i * size;

		if (is_table(t->level, desc)) {
			struct table *child = table_find(table_pa(r, desc));

			if (child && child->parent == t)
				table_unlink(child, by);
			if (by)
				ghost_add(t->space, GHOST_TABLE, va, size, size, t->level, desc,
					  by);
		} else if (by && is_leaf(t->level, desc) && (desc & DESC_AF)) {
			ghost_add(t->space, GHOST_LEAF, va, size,
				  desc & DESC_CONT ? cont_size(r, t->level) : size,
				  t->level, desc, by);
		}
	}
	table_forget(t);
}

/* ---- roots ------------------------------------------------------------- */

static bool root_empty(const struct regime *r, u64 root)
{
	unsigned int nr = 1 << (r->va_bits - r->shift - r->stride * (3 - r->start)), i;

	for (i = 0; i < nr; i++)
		if (read_desc(root + 8 * i))
			return false;
	return true;
}

static void space_put_tables(struct space *s)
{
	if (s->table)
		table_unlink(s->table, NULL);
	s->table = NULL;
}

/* Tables of an address space that nobody runs and that has none left are pages like others. */
static void space_forget_if_empty(struct space *s)
{
	if (!s->loaded && s->table && root_empty(&s->regime, s->root))
		space_put_tables(s);
}

/* An address space stays while something of it may be cached. */
static void spaces_reap(void)
{
	struct space **p = &space_list, *s;

	while ((s = *p)) {
		space_forget_if_empty(s);
		if (!s->loaded && !s->table && !s->nr_ghosts) {
			*p = s->next;
			free(s);
		} else {
			p = &s->next;
		}
	}
}

/* ---- changes ----------------------------------------------------------- */

/*
 * Valid entries of a contiguous block must agree: on the hint, on where they lead
 * and on attributes.  On permissions only once an invalidation has been: a kernel
 * changes them one by one.
 */
static void check_block(struct table *t, unsigned int i, bool permissions, const struct actor *by)
{
	const struct regime *r = &t->space->regime;
	u64 size = level_size(r, t->level);
	unsigned int n = cont_size(r, t->level) / size, first = i & ~(n - 1), j;
	u64 mask = DESC_CONT | DESC_ATTR | DESC_NG, want = read_desc(t->pa + i * sizeof(u64));

	if (!is_leaf(t->level, want) || first + n > t->nr)
		return;
	for (j = first; j < first + n; j++) {
		u64 got = read_desc(t->pa + j * sizeof(u64));
		u64 differ = (want ^ got) & mask;

		if (j == i || !is_leaf(t->level, got) || !((want | got) & DESC_CONT))
			continue;
		if (leaf_oa(r, t->level, got) + ((u64)i - j) * size != leaf_oa(r, t->level, want))
			differ |= ADDR_MASK;
		if (permissions) {
			/* With DBM the hardware may make one writable and not the others. */
			differ |= (want ^ got) & (DESC_USER | DESC_PXN | DESC_UXN |
						  (want & got & DESC_DBM ? 0 : DESC_RDONLY));
		}
		if (differ) {
			struct finding f = {
				.kind = "MISPROGRAMMED", .va = t->va + i * size,
				.asid = t->space->asid, .old = got, .new = want,
				.writer = t->writer[j],
			};

			f.what = differ & DESC_CONT ? "hint not in all entries of the block" :
				 differ & ADDR_MASK ? "addresses in the block do not follow" :
				 differ & mask ? "attributes in the block differ" :
				 "permissions in the block differ";
			report(&f, by);
			return;
		}
	}
}

/* What took permissions from this block is invalidated: it has one set of them. */
void block_check_permissions(struct space *s, u64 va, const struct actor *by)
{
	struct walk w;

	if (!s->table)
		return;
	table_walk(s, va, &w);
	if (w.valid && w.table && (w.desc & DESC_CONT))
		check_block(w.table, (w.va - w.table->va) / w.size, true, by);
}

static void entry_changed(struct table *t, unsigned int i, u64 new, const struct actor *by)
{
	struct space *s = t->space;
	const struct regime *r = &s->regime;
	u64 old = t->desc[i], size = level_size(r, t->level), va = t->va + i * size;
	u64 old_cover = old & DESC_CONT ? cont_size(r, t->level) : size;
	bool was = is_leaf(t->level, old) && (old & DESC_AF);
	bool now = is_leaf(t->level, new) && (new & DESC_AF);
	bool was_table = is_table(t->level, old), now_table = is_table(t->level, new);
	const char *what = NULL;

	t->desc[i] = new;
	if (was_table && now_table && table_pa(r, old) == table_pa(r, new))
		goto out;
	if (was_table) {
		struct table *child = table_find(table_pa(r, old));

		if (child && child->parent == t)
			table_unlink(child, by);
		if (new & DESC_VALID)
			what = now_table ? "another table" : "a block for a table";
	} else if (was && now_table) {
		what = "a table for a block";
	} else if (was && is_leaf(t->level, new)) {
		switch (compare_leaf(old, new)) {
		case TIGHTENED:
			ghost_add(s, GHOST_PERM, va, size, old_cover, t->level, old, by);
			goto out;
		case DIFFERENT:
			what = (old ^ new) & ADDR_MASK ? "another address" :
			       (old ^ new) & DESC_CONT ? "another size" : "other attributes";
			break;
		default:
			/* No TLB loads it now; those that have it keep it. */
			if (!now)
				ghost_add(s, GHOST_AGED, va, size, old_cover, t->level, old, by);
			goto out;
		}
	}
	if (what && s->maybe) {
		struct finding f = {
			.kind = "BBM", .what = what, .va = va, .asid = s->asid,
			.old = old, .new = new, .writer = t->writer[i],
		};

		report(&f, by);
	} else if (now || now_table) {
		ghosts_check_new(s, va, size, t->level, new, by);
	}
	/* Only now, or the check would meet it */
	if (was || was_table)
		ghost_add(s, was ? GHOST_LEAF : GHOST_TABLE, va, size, old_cover, t->level, old,
			  by);
	if (now_table) {
		u64 pa = table_pa(r, new);

		if (frame_at(pa) && frame_at(pa)->ghosts)
			ghosts_of_frame_reused(frame_at(pa), pa, "becomes a page table", by);
		table_link(s, t, pa, va, t->level + 1);
	}
out:
	t->writer[i] = writer_of(by);
	if (is_leaf(t->level, new))
		check_block(t, i, false, by);
}

/* The guest wrote here: bring the copies up to date. */
void table_store(u64 pa, unsigned int bytes, const struct actor *by)
{
	u64 end = pa + bytes;

	for (pa &= ~7ULL; pa < end; pa += 8) {
		struct frame *f = frame_at(pa);
		struct table *t = f ? f->tables : NULL;
		u64 new = read_desc(pa);

		if (f && f->walkers)
			ghosts_of_walker_written(f, pa, new, by);
		for (; t; t = t->next_in_frame) {
			u64 i = (pa - t->pa) / 8;

			if (i >= t->nr)
				continue;
			if (t->desc[i] != new) {
				struct space *s = t->space;
				bool root = t == s->table;

				model_time++;
				entry_changed(t, i, new, by);
				if (root && !new)
					space_forget_if_empty(s);
			}
			break;
		}
	}
}

/* Take over what the hardware writes by itself: access flag, and dirty. */
static void hardware_update(struct table *t, unsigned int i, u64 now)
{
	u64 old = t->desc[i], by_itself = DESC_AF | (old & DESC_DBM ? DESC_RDONLY : 0);

	if (old == now)
		return;
	if ((old ^ now) & ~by_itself)
		raced++;
	else
		t->desc[i] = now;
}

void table_walk(struct space *s, u64 va, struct walk *w)
{
	const struct regime *r = &s->regime;
	u64 pa = s->root;
	unsigned int level;

	memset(w, 0, sizeof(*w));
	for (level = r->start; level <= 3; level++) {
		u64 size = level_size(r, level), mask = (1ULL << r->stride) - 1, desc;
		unsigned int i;

		if (level == r->start)
			mask = (1ULL << (r->va_bits - r->shift - r->stride * (3 - level))) - 1;
		i = va / size & mask;
		desc = read_desc(pa + 8 * i);
		w->table = table_find(pa);
		if (w->table && i < w->table->nr)
			hardware_update(w->table, i, desc);
		if (is_table(level, desc)) {
			pa = table_pa(r, desc);
			continue;
		}
		w->valid = is_leaf(level, desc);
		w->desc = desc;
		w->level = level;
		w->size = size;
		w->va = va & ~(size - 1);
		w->oa = leaf_oa(r, level, desc);
		return;
	}
}

/*
 * A store of another vCPU may be in memory before QEMU has told of it.  Who has read
 * it there, and invalidates the kernel's address because of it, finds it known.
 */
void tables_catch_up(u64 va)
{
	static const struct actor somebody = { .cpu = MAX_CPUS };
	struct space *s;
	struct walk w;

	for (s = space_list; s; s = s->next) {
		unsigned int i;
		u64 now;

		if (!s->kernel || !s->table)
			continue;
		table_walk(s, va, &w);
		if (!w.table)
			continue;
		i = (w.va - w.table->va) / w.size;
		now = read_desc(w.table->pa + 8 * i);
		if (w.table->desc[i] != now) {
			model_time++;
			entry_changed(w.table, i, now, &somebody);
		}
	}
}

/* ---- who runs what ----------------------------------------------------- */

/* A vCPU has this root in a TTBR now.  NULL if nothing is in it. */
struct space *space_load(unsigned int cpu, unsigned int which, u64 root, unsigned int asid)
{
	struct vcpu *v = &vcpus[cpu];
	struct space *s, *old = v->space[which], *found = NULL;
	static unsigned int switches;

	/*
	 * A kernel that is not mapped at EL0 (KPTI) has a pair of ASIDs for each address
	 * space, and goes from one to the other without a new root: that of the kernel
	 * stands for both.
	 */
	if (old && old->root == root && (which || (old->asid ^ asid) <= 1) && old->table)
		return old;
	if (old) {
		old->loaded &= ~(1U << cpu);
		v->space[which] = NULL;
		space_forget_if_empty(old);
		if (!(++switches % 256))
			spaces_reap();
	}
	if (!v->regime[which].shift || root_empty(&v->regime[which], root))
		return NULL;
	for (s = space_list; s; s = s->next) {
		if (s->root == root && s->kernel == which && (which || s->asid == asid))
			found = s;
		else if (s->root == root)
			space_put_tables(s);	/* this page has a new owner */
	}
	if (!found) {
		/* A kernel leaves its first tables for good, and takes some along. */
		for (s = space_list; which && s; s = s->next)
			if (s->kernel && !s->loaded)
				space_put_tables(s);
		found = calloc(1, sizeof(*found));
		if (!found)
			give_up("no memory for an address space");
		found->root = root;
		found->asid = asid;
		found->kernel = which;
		found->next = space_list;
		space_list = found;
	}
	if (!found->table) {
		found->regime = v->regime[which];
		found->table = table_link(found, NULL, root,
					  which ? ~0ULL << found->regime.va_bits : 0,
					  found->regime.start);
	}
	found->loaded |= 1U << cpu;
	found->maybe |= 1U << cpu;
	v->space[which] = found;
	return found;
}

/*
 * After this invalidation only who runs an address space can hold entries of it.  If
 * nobody does, its tables are looked at anew when somebody will.
 */
void spaces_may_forget(unsigned int cpu, unsigned int asid, bool any_asid, bool local)
{
	struct space *s;

	for (s = space_list; s; s = s->next) {
		if (s->kernel || (!any_asid && s->asid != asid))
			continue;
		s->maybe &= s->loaded | (local ? ~(1U << cpu) : 0);
		if (!s->maybe)
			space_put_tables(s);
	}
}
