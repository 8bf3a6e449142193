// SPDX-License-Identifier: GPL-2.0-only
/*
 * Symbols, reports and the summary.  A report that was made before, from the same
 * two places, only counts.
 */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "tlbsim.h"

u64 disagreements, raced;

struct symbol {
	u64 addr;
	char *name;
};

static struct symbol *symbols;
static size_t nr_symbols;
static u64 slide;

struct known {
	const char *kind, *what;
	u64 pc, writer, count;
	struct known *next;
};

static struct known *reports;
static unsigned long nr_reports;

/* ---- output ------------------------------------------------------------ */

static FILE *out;

bool out_open(const char *file)
{
	out = file ? fopen(file, "w") : stderr;
	return out;
}

void out_line(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	fputs("tlbsim: ", out);
	vfprintf(out, fmt, args);
	fputc('\n', out);
	va_end(args);
	fflush(out);
}

void give_up(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	fputs("tlbsim: ", stderr);
	vfprintf(stderr, fmt, args);
	fputc('\n', stderr);
	va_end(args);
	_Exit(2);
}

/* ---- symbols ----------------------------------------------------------- */

static int by_addr(const void *a, const void *b)
{
	u64 x = ((const struct symbol *)a)->addr, y = ((const struct symbol *)b)->addr;

	return x < y ? -1 : x > y;
}

/* System.map, or /proc/kallsyms: only what is code */
bool symbols_load(const char *file)
{
	FILE *f = fopen(file, "r");
	char line[512], name[256], type;
	size_t max = 0;
	u64 addr;

	if (!f)
		return false;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%" SCNx64 " %c %255s", &addr, &type, name) != 3 ||
		    !strchr("tTwW", type) || name[0] == '$')
			continue;
		if (nr_symbols == max) {
			max = max ? 2 * max : 1 << 16;
			symbols = realloc(symbols, max * sizeof(*symbols));
			if (!symbols)
				give_up("no memory for symbols");
		}
		symbols[nr_symbols].addr = addr;
		symbols[nr_symbols++].name = strdup(name);
	}
	fclose(f);
	qsort(symbols, nr_symbols, sizeof(*symbols), by_addr);
	return nr_symbols;
}

/* Where the kernel has its vectors says how far it was moved (KASLR). */
void symbols_slide(u64 addr)
{
	size_t i;

	if (!(addr >> 55 & 1))
		return;
	for (i = 0; i < nr_symbols; i++)
		if (!strcmp(symbols[i].name, "vectors"))
			slide = addr - symbols[i].addr;
}

static const char *symbol(u64 pc, char *buf, size_t size)
{
	size_t low = 0, high = nr_symbols;

	pc |= pc >> 55 & 1 ? 0xffULL << 56 : 0;
	if (!pc)
		return "?";
	while (low < high) {
		size_t mid = (low + high) / 2;

		if (symbols[mid].addr <= pc - slide)
			low = mid + 1;
		else
			high = mid;
	}
	if (!low || pc - slide - symbols[low - 1].addr > 1 << 20)
		snprintf(buf, size, "0x%" PRIx64, pc);
	else
		snprintf(buf, size, "%s+0x%" PRIx64, symbols[low - 1].name,
			 pc - slide - symbols[low - 1].addr);
	return buf;
}

/* ---- reports ----------------------------------------------------------- */

void report(const struct finding *f, const struct actor *by)
{
	char here[300], there[300];
	u64 writer = f->writer & ~(0xffULL << 56);
	struct known *k;

	nr_reports++;
	for (k = reports; k; k = k->next) {
		if (k->pc == by->pc && k->writer == writer && k->kind == f->kind &&
		    !strcmp(k->what, f->what)) {
			k->count++;
			return;
		}
	}
	k = calloc(1, sizeof(*k));
	if (!k)
		give_up("no memory for a report");
	*k = (struct known) {
		.kind = f->kind, .what = f->what, .pc = by->pc, .writer = writer, .count = 1,
		.next = reports,
	};
	reports = k;
	out_line("%s: %s: cpu %u pc %s va 0x%" PRIx64 " asid %u old 0x%" PRIx64
		 " (by cpu %u, %s) new 0x%" PRIx64, f->kind, f->what, by->cpu,
		 symbol(by->pc, here, sizeof(here)), f->va, f->asid, f->old,
		 (unsigned int)(f->writer >> 56), symbol(writer, there, sizeof(there)), f->new);
}

void summary(void)
{
	unsigned int cpu, different = 0;
	char here[300], there[300];
	struct known *k;
	u64 accesses = 0;

	for (cpu = 0; cpu < nr_cpus; cpu++)
		accesses += vcpus[cpu].accesses;
	for (k = reports; k; k = k->next) {
		different++;
		if (k->count > 1)
			out_line("again: %" PRIu64 " times %s: %s: pc %s (by %s)", k->count - 1,
				 k->kind, k->what, symbol(k->pc, here, sizeof(here)),
				 symbol(k->writer, there, sizeof(there)));
	}
	out_line("%lu reports, %u different, %" PRIu64 " accesses checked, %" PRIu64
		 " by entries changed since, %" PRIu64 " disagreements with QEMU, %" PRIu64
		 " raced", nr_reports, different, accesses, served_stale, disagreements, raced);
}
