// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest that breaks each rule once, and then keeps it: every fault has an address
 * of its own, by which "expected" knows it; the twins are to be silent.
 */
#include <stdint.h>

typedef uint64_t u64;

#define VALID		1ULL
#define PAGE		(VALID | 2)
#define TABLE		(VALID | 2)
#define BLOCK		VALID
#define DEVICE		(1ULL << 2)
#define USER		(1ULL << 6)
#define RDONLY		(1ULL << 7)
#define SHARED		(3ULL << 8)
#define AF		(1ULL << 10)
#define NG		(1ULL << 11)
#define DBM		(1ULL << 51)
#define CONT		(1ULL << 52)
#define PXN		(1ULL << 53)
#define NORMAL		(SHARED | AF)
#define DATA		(NORMAL | NG | PAGE)

#define HIGH		0xffffff8000000000ULL
#define UART		(*(volatile unsigned int *)(HIGH + 0x09000000))
#define BASE		0x10000000ULL		/* of what is tried, 2M a table */
#define CODE		0x40000000ULL		/* where EL0 has its program */
#define NR_TABLES	8

/* Each use is to have a PC of its own: reports from the same two places are folded. */
#define __always_inline inline __attribute__((__always_inline__))

u64 root0[512] __attribute__((aligned(4096)));
u64 root1[512] __attribute__((aligned(4096)));
char stacks[2][16384] __attribute__((aligned(16384)));

static u64 mid0[512] __attribute__((aligned(4096)));
static u64 mid1[512] __attribute__((aligned(4096)));
static u64 code_mid[512] __attribute__((aligned(4096)));
static u64 code_leaf[512] __attribute__((aligned(4096)));
static u64 leaf[NR_TABLES][512] __attribute__((aligned(4096)));
static u64 spare[512] __attribute__((aligned(4096)));
static char pages[64][4096] __attribute__((aligned(65536)));
static volatile int second_is_up;

extern char vectors[], user_code[], second[];
void enter_el0(u64 pc);

static __always_inline u64 pa(const void *p)
{
	return (u64)p & ~HIGH;
}

static __always_inline void dsb(void) { asm volatile("dsb ish" ::: "memory"); }
static __always_inline void isb(void) { asm volatile("isb" ::: "memory"); }

static __always_inline void tlbi_va(u64 va)
{
	asm volatile("tlbi vae1is, %0" :: "r"(va >> 12 | 1ULL << 48) : "memory");
}

static __always_inline void tlbi_last(u64 va)
{
	asm volatile("tlbi vale1is, %0" :: "r"(va >> 12 | 1ULL << 48) : "memory");
}

static __always_inline void flush(u64 va)
{
	dsb();
	tlbi_va(va);
	dsb();
	isb();
}

static void flush_all(void)
{
	dsb();
	asm volatile("tlbi vmalle1is" ::: "memory");
	dsb();
	isb();
}

static __always_inline void set(u64 *entry, u64 desc)
{
	*(volatile u64 *)entry = desc;
}

static __always_inline void touch(u64 va)
{
	dsb();
	isb();
	*(volatile char *)va;
}

static __always_inline u64 *pte(u64 va)
{
	return &leaf[(va - BASE) >> 21][va >> 12 & 511];
}

static __always_inline u64 page(int i)
{
	return pa(pages[i]);
}

/* A mapped page to begin with, in a block of its own */
static __always_inline u64 mapped(int block)
{
	u64 va = BASE + block * 0x10000;

	set(pte(va), page(0) | DATA);
	touch(va);
	return va;
}

static __always_inline u64 mapped_block(int block, u64 flags)
{
	u64 va = BASE + block * 0x10000;
	int i;

	for (i = 0; i < 16; i++)
		set(pte(va) + i, page(i) | DATA | CONT | flags);
	touch(va);
	return va;
}

static void go_to_el0(void)
{
	enter_el0(CODE | (pa(user_code) & 0xfff));
}

/* ---- BBM --------------------------------------------------------------- */

static void bbm(void)
{
	u64 va = mapped(1);

	set(pte(va), page(1) | DATA);			/* fault: another address */
	flush(va);

	va = mapped(2);					/* twin */
	set(pte(va), 0);
	flush(va);
	set(pte(va), page(1) | DATA);

	va = mapped(3);
	set(pte(va), 0);
	set(pte(va), page(1) | DATA);			/* fault: broken, but not invalidated */
	flush(va);

	va = mapped(4);
	set(pte(va), page(0) | DATA | DEVICE);		/* fault: another kind of memory */
	flush(va);

	va = mapped(5);
	set(pte(va), page(0) | DATA | CONT);		/* fault: another size */
	flush(va);

	va = mapped(6);
	set(pte(va), 0);
	tlbi_va(va);					/* fault: no DSB before */
	dsb();
	set(pte(va), page(1) | DATA);
	flush(va);

	va = mapped(7);
	set(pte(va), 0);
	dsb();
	tlbi_va(va);
	set(pte(va), page(1) | DATA);			/* fault: no DSB after */
	flush(va);

	va = mapped(8);
	set(pte(va), 0);
	dsb();
	/* fault: the other vCPU keeps it */
	asm volatile("tlbi vae1, %0" :: "r"(va >> 12 | 1ULL << 48) : "memory");
	dsb();
	set(pte(va), page(1) | DATA);
	flush(va);

	va = mapped(9);
	set(pte(va), 0);
	dsb();
	/* fault: of another address space */
	asm volatile("tlbi vae1is, %0" :: "r"(va >> 12 | 2ULL << 48) : "memory");
	dsb();
	set(pte(va), page(1) | DATA);
	flush(va);

	va = mapped_block(10, 0);
	for (int i = 0; i < 16; i++)
		set(pte(va) + i, 0);
	flush(va);
	set(pte(va) + 5, page(20) | DATA);		/* fault: others keep theirs */
	flush_all();

	va = mapped_block(11, 0);			/* twin, by range */
	for (int i = 0; i < 16; i++)
		set(pte(va) + i, 0);
	dsb();
	asm volatile("tlbi rvae1is, %0"
		     :: "r"(va >> 12 | 1ULL << 48 | 1ULL << 46 | 7ULL << 39) : "memory");
	dsb();
	set(pte(va) + 5, page(20) | DATA);

	va = mapped(14);
	set(pte(va), 0);
	dsb();
	/* fault: the hint says level 2 */
	asm volatile("tlbi vae1is, %0" :: "r"(va >> 12 | 1ULL << 48 | 6ULL << 44) : "memory");
	dsb();
	set(pte(va), page(1) | DATA);
	flush(va);

	va = mapped(15);
	set(pte(va), 0);
	dsb();
	/* twin: level 3 */
	asm volatile("tlbi vae1is, %0" :: "r"(va >> 12 | 1ULL << 48 | 7ULL << 44) : "memory");
	dsb();
	set(pte(va), page(1) | DATA);

	va = mapped(12);				/* twin: more permission, access flag */
	set(pte(va), page(0) | DATA | RDONLY);
	flush(va);
	set(pte(va), page(0) | DATA | USER);
	set(pte(va), (page(0) | DATA | USER) & ~AF);
	touch(va);					/* the hardware sets it */
	go_to_el0();
	flush(va);

	va = mapped(13);				/* twin: dirty, by the hardware */
	set(pte(va), page(0) | DATA | RDONLY | DBM);
	flush(va);
	*(volatile char *)va = 1;
	set(pte(va), 0);
	flush(va);
	set(pte(va), page(1) | DATA);

	va = mapped(16);
	set(pte(va), (page(0) | DATA) & ~AF);
	set(pte(va), page(1) | DATA);			/* fault: it was used before */
	flush(va);

	va = mapped(17);
	set(pte(va), (page(0) | DATA) & ~AF);
	flush(va);
	set(pte(va), page(1) | DATA);			/* twin: and cannot be now */

	va = mapped(18);
	set(pte(va), (page(0) | DATA) & ~AF);
	flush(va);
	touch(va);
	set(pte(va), page(1) | DATA);			/* fault: the hardware has set it again */
	flush(va);

	va = mapped(19);
	set(pte(va), (page(0) | DATA) & ~AF);
	set(pte(va), 0);
	set(pte(va), page(1) | DATA);			/* fault: removed, but not invalidated */
	flush(va);

	va = BASE + 0x1000000;
	set(&mid0[va >> 21 & 511], 0x42000000 | NORMAL | NG | BLOCK);
	touch(va);
	set(&mid0[va >> 21 & 511], pa(spare) | TABLE);	/* fault: a table for a block */
	flush(va);
	set(&mid0[va >> 21 & 511], 0);
	flush(va);					/* twin: back */
	set(&mid0[va >> 21 & 511], 0x42000000 | NORMAL | NG | BLOCK);
	set(&mid0[va >> 21 & 511], 0);
	flush(va);

	va = BASE + 0x200000;				/* table 1 */
	set(&mid0[va >> 21 & 511], 0);
	dsb();
	tlbi_last(va);					/* fault: leaves the walk caches */
	dsb();
	set(&mid0[va >> 21 & 511], pa(spare) | TABLE);
	set(&mid0[va >> 21 & 511], 0);
	flush(va);
	set(&mid0[va >> 21 & 511], pa(leaf[1]) | TABLE);	/* twin */
}

/* ---- blocks ------------------------------------------------------------ */

static void misprogrammed(void)
{
	u64 va = BASE + 0x400000;
	int i;

	for (i = 0; i < 16; i++)			/* twin */
		set(pte(va) + i, page(i) | DATA | CONT);

	va += 0x10000;
	set(pte(va), page(0) | DATA | CONT);
	set(pte(va) + 1, page(1) | DATA);		/* fault: no hint */
	flush(va);

	va += 0x10000;
	set(pte(va), page(0) | DATA | CONT);
	set(pte(va) + 2, page(1) | DATA | CONT);	/* fault: does not follow */

	va += 0x10000;
	set(pte(va), page(0) | DATA | CONT);
	set(pte(va) + 1, page(1) | DATA | CONT | DEVICE);	/* fault: attributes */

	va += 0x10000;
	for (i = 0; i < 16; i++)
		set(pte(va) + i, page(i) | DATA | CONT);
	touch(va);
	set(pte(va) + 3, page(3) | DATA | CONT | RDONLY);
	flush(va + 0x3000);				/* fault: one differs, and is to stay so */
	for (i = 0; i < 16; i++)
		set(pte(va) + i, page(i) | DATA | CONT | RDONLY);
	for (i = 0; i < 16; i++)
		flush(va + i * 0x1000);

	va += 0x10000;
	for (i = 0; i < 16; i++)			/* twin: all of them, then invalidated */
		set(pte(va) + i, page(i) | DATA | CONT);
	touch(va);
	for (i = 0; i < 16; i++)
		set(pte(va) + i, page(i) | DATA | CONT | RDONLY);
	for (i = 0; i < 16; i++)
		flush(va + i * 0x1000);
	flush_all();
}

/* ---- stale ------------------------------------------------------------- */

static void stale(void)
{
	u64 va = BASE + 0x600000;
	u64 *mid = &mid0[va >> 21 & 511];

	set(pte(va), page(0) | DATA);
	touch(va);
	set(pte(va), 0);
	go_to_el0();					/* fault: removed */
	flush(va);

	va += 0x10000;
	set(pte(va), page(0) | DATA);
	touch(va);
	set(pte(va), page(0) | DATA | RDONLY);
	go_to_el0();					/* fault: permission taken */
	flush(va);

	va += 0x10000;
	set(pte(va), page(0) | DATA);
	touch(va);
	set(pte(va), 0);
	flush(va);
	go_to_el0();					/* twin */

	va += 0x10000;
	set(pte(va), page(0) | DATA | RDONLY);
	touch(va);
	set(pte(va), 0);
	set(pte(va), page(0) | DATA);			/* twin: back, with more permission */
	go_to_el0();
	flush(va);

	va = BASE + 0x800000;
	mid = &mid0[va >> 21 & 511];
	set(mid, 0);
	dsb();
	tlbi_last(va);
	dsb();
	go_to_el0();					/* fault: the table is gone, not for walks */
	flush(va);
	set(mid, pa(leaf[4]) | TABLE);

	va = BASE + 0xa00000;
	mid = &mid0[va >> 21 & 511];
	set(mid, 0);
	set(&leaf[5][7], 0x1234567);			/* fault: it holds something else */
	flush(va);
	set(&leaf[5][8], 0x1234567);			/* twin */
	set(&leaf[5][7], 0);
	set(&leaf[5][8], 0);
	set(mid, pa(leaf[5]) | TABLE);
}

/* ---- reuse ------------------------------------------------------------- */

static __always_inline void clear_page(int i)
{
	u64 size, offset;

	asm("mrs %0, dczid_el0" : "=r"(size));
	size = 4ULL << (size & 15);
	for (offset = 0; offset < 4096; offset += size)
		asm volatile("dc zva, %0" :: "r"(pages[i] + offset) : "memory");
}

static void leak(void)
{
	u64 va = BASE + 0xc00000, *mid = &mid0[(BASE + 0x2000000) >> 21 & 511];

	set(pte(va), page(40) | DATA);
	touch(va);
	set(pte(va), 0);
	clear_page(40);					/* fault */
	go_to_el0();
	flush(va);
	clear_page(40);					/* twin */

	va += 0x10000;
	set(pte(va), page(41) | DATA);
	touch(va);
	set(pte(va), 0);
	set(mid, page(41) | TABLE);			/* fault */
	set(mid, 0);
	flush(BASE + 0x2000000);
	go_to_el0();
	flush_all();

	va += 0x10000;
	set(pte(va), page(42) | DATA);
	touch(va);
	set(pte(va), 0);
	clear_page(42);					/* twin: no program runs before the flush */
	flush(va);
	go_to_el0();
}

/* ---- TLBIs that have to be repeated ------------------------------------ */

static void repeat(void)
{
	u64 va = mapped(1);

	set(pte(va), 0);
	flush(va);
	set(pte(va), page(1) | DATA);			/* fault: once is not enough */
	flush(va);
	flush(va);

	va = mapped(2);
	set(pte(va), 0);
	flush(va);
	dsb();
	set(pte(va), page(1) | DATA);			/* fault: nor is another DSB */
	flush(va);
	flush(va);

	va = mapped(3);
	set(pte(va), 0);
	dsb();
	tlbi_va(va);
	tlbi_last(0);
	dsb();
	set(pte(va), page(1) | DATA);			/* fault: nor two and one DSB */
	flush(va);
	flush(va);

	va = mapped(4);					/* twin: any other, and a DSB */
	set(pte(va), 0);
	flush(va);
	tlbi_last(0);
	dsb();
	set(pte(va), page(1) | DATA);
}

/* ---- counts ------------------------------------------------------------ */

/* 64 pages, twice: 4 entries with the hint, 64 without; each comes again if there is room. */
static void count(void)
{
	u64 va = BASE + 0xe00000;
	int i, pass;

	for (i = 0; i < 64; i++)
		set(pte(va) + i, page(i) | DATA | CONT);
	touch(va);
	asm volatile("hint #0x70" ::: "memory");
	for (pass = 0; pass < 2; pass++)
		for (i = 0; i < 64; i++)
			asm volatile("ldrb w9, [%0]" :: "r"(va + i * 4096) : "x9", "memory");
	asm volatile("hint #0x71" ::: "memory");
}

/* ---- start and end ----------------------------------------------------- */

/* Runs with the MMU off */
void build_tables(void)
{
	int i;

	root1[0] = 0 | NORMAL | DEVICE | PXN | BLOCK;
	root1[1] = pa(mid1) | TABLE;
	for (i = 0; i < 512; i++)
		mid1[i] = (0x40000000 + ((u64)i << 21)) | NORMAL | BLOCK;
	/* The program that EL0 has, and this code until it is at the high addresses */
	root0[1] = pa(code_mid) | TABLE;
	code_mid[0] = pa(code_leaf) | TABLE;
	code_leaf[0] = (pa(user_code) & ~0xfffULL) | DATA | USER | RDONLY;
	code_mid[1] = 0x40200000 | NORMAL | NG | BLOCK;
	root0[0] = pa(mid0) | TABLE;
	for (i = 0; i < NR_TABLES; i++)
		mid0[(BASE >> 21 & 511) + i] = pa(leaf[i]) | TABLE;
}

static long psci(u64 function, u64 a, u64 b)
{
	register u64 x0 asm("x0") = function;
	register u64 x1 asm("x1") = a;
	register u64 x2 asm("x2") = b;
	register u64 x3 asm("x3") = 0;

	asm volatile("hvc #0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}

static void say(const char *s)
{
	while (*s)
		UART = *s++;
}

void stuck(void)
{
	say("selftest: an exception\n");
	psci(0x84000008, 0, 0);
}

void second_main(void)
{
	second_is_up = 1;
	for (;;)
		asm volatile("wfi");
}

void main(void)
{
	asm volatile("msr vbar_el1, %0" :: "r"(vectors));
	isb();
	psci(0xc4000003, 1, pa(second));
	while (!second_is_up)
		;
	if (REPEAT) {
		repeat();
	} else {
		bbm();
		misprogrammed();
		stale();
		leak();
		count();
	}
	say("selftest: done\n");
	psci(0x84000008, 0, 0);
}
