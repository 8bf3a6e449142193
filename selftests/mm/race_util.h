/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the *_race tests have in common: options, threads that start together and
 * end together, and one place to report what went wrong.
 *
 * A test runs several cases, each in turn for some seconds. In a case each thread
 * repeats a step until race_on() says that the time is up or that another thread
 * has failed. Time only ends a case; whether it passes depends on data.
 */
#ifndef RACE_UTIL_H
#define RACE_UTIL_H

#include "contpte_util.h"
#include <getopt.h>
#include <pthread.h>

#include "../kselftest.h"

#define RACE_MAX_THREADS	64

struct race {
	/* options */
	unsigned int seconds;	/* of each case */
	unsigned int threads;	/* of each case, where it can have any number */
	__u64 seed;
	/* of the case that is running */
	struct timespec end;
	pthread_barrier_t start;
	bool stop;
	bool failed;
	char why[256];
};

struct race_thread {
	struct race *race;
	pthread_t tid;
	unsigned int id;	/* counts from 0 */
	__u64 rand;		/* for cont_rand(): depends on the seed and on id only */
	unsigned long steps;
	void (*fn)(struct race_thread *t);
	void *arg;
};

static inline void race_usage(const char *name, const struct race *def, FILE *f)
{
	fprintf(f, "Usage: %s [-n seconds] [-t threads] [-s seed]\n"
		"  -n  how long each case runs, 1 to 86400 (%u)\n"
		"  -t  how many threads do it, 2 to %u (%u)\n"
		"  -s  seed of the random numbers (CONTPTE_SEED, or the clock)\n",
		name, def->seconds, RACE_MAX_THREADS, def->threads);
}

static inline bool race_number(const char *arg, __u64 min, __u64 max, __u64 *val)
{
	char *end;

	errno = 0;
	*val = strtoull(arg, &end, 0);
	return *arg && *arg != '-' && !*end && !errno && *val >= min && *val <= max;
}

/* Fills in *race; ends the program when the options are wrong. */
static inline void race_options(struct race *race, int argc, char **argv,
				unsigned int seconds, unsigned int threads)
{
	struct race def = { .seconds = seconds, .threads = threads };
	char seed[24];
	__u64 val;
	int opt;

	*race = def;
	while ((opt = getopt(argc, argv, "hn:t:s:")) != -1) {
		bool ok = true;

		switch (opt) {
		case 'n':
			ok = race_number(optarg, 1, 86400, &val);
			race->seconds = val;
			break;
		case 't':
			ok = race_number(optarg, 2, RACE_MAX_THREADS, &val);
			race->threads = val;
			break;
		case 's':
			ok = race_number(optarg, 0, ~0ULL, &val);
			setenv("CONTPTE_SEED", optarg, 1);
			break;
		case 'h':
			race_usage(argv[0], &def, stdout);
			exit(KSFT_PASS);
		default:
			race_usage(argv[0], &def, stderr);
			exit(KSFT_FAIL);
		}
		if (!ok) {
			fprintf(stderr, "%s: -%c does not take '%s'\n", argv[0], opt,
				optarg);
			race_usage(argv[0], &def, stderr);
			exit(KSFT_FAIL);
		}
	}
	if (optind < argc) {
		race_usage(argv[0], &def, stderr);
		exit(KSFT_FAIL);
	}
	ksft_print_header();
	race->seed = cont_seed();
	/* For the patterns that cont_map_make() seeds from here. */
	snprintf(seed, sizeof(seed), "%llu", race->seed);
	setenv("CONTPTE_SEED", seed, 1);
}

/* To be asked before each step. */
static inline bool race_on(struct race *race)
{
	struct timespec now;

	if (__atomic_load_n(&race->stop, __ATOMIC_ACQUIRE))
		return false;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (now.tv_sec > race->end.tv_sec ||
	    (now.tv_sec == race->end.tv_sec && now.tv_nsec >= race->end.tv_nsec))
		__atomic_store_n(&race->stop, true, __ATOMIC_RELEASE);
	return !__atomic_load_n(&race->stop, __ATOMIC_ACQUIRE);
}

/* Ends the case. Of several reports the first one is kept. */
static inline void __attribute__((format(printf, 2, 3)))
race_fail(struct race *race, const char *fmt, ...)
{
	va_list ap;

	if (!__atomic_exchange_n(&race->failed, true, __ATOMIC_ACQ_REL)) {
		va_start(ap, fmt);
		vsnprintf(race->why, sizeof(race->why), fmt, ap);
		va_end(ap);
	}
	__atomic_store_n(&race->stop, true, __ATOMIC_RELEASE);
}

static inline void *race_main(void *arg)
{
	struct race_thread *t = arg;

	pthread_barrier_wait(&t->race->start);
	t->fn(t);
	return NULL;
}

/*
 * Run a case: thread i does fn(&t[i]), which asks race_on() before each step and
 * counts its steps. Returns when all have ended; whether it went well is in
 * race->failed. The caller may set t[i].arg and t[i].fn; where that is NULL, fn
 * is taken.
 */
static inline void race_run(struct race *race, struct race_thread *t,
			    unsigned int nr, void (*fn)(struct race_thread *t))
{
	unsigned int i;
	int err;

	race->stop = false;
	race->failed = false;
	race->why[0] = '\0';
	pthread_barrier_init(&race->start, NULL, nr + 1);
	for (i = 0; i < nr; i++) {
		t[i].race = race;
		t[i].id = i;
		t[i].rand = cont_mix(race->seed + i);
		t[i].steps = 0;
		if (!t[i].fn)
			t[i].fn = fn;
		err = pthread_create(&t[i].tid, NULL, race_main, &t[i]);
		/* Those that did start wait at the barrier: there is no way on. */
		if (err)
			ksft_exit_fail_msg("pthread_create: %s\n", strerror(err));
	}
	clock_gettime(CLOCK_MONOTONIC, &race->end);
	race->end.tv_sec += race->seconds;
	pthread_barrier_wait(&race->start);
	for (i = 0; i < nr; i++)
		pthread_join(t[i].tid, NULL);
	pthread_barrier_destroy(&race->start);
	if (!cont_rules_hold())
		race_fail(race, "a block breaks a rule, see the kernel's log");
}

/* Report the case that race_run() has run. */
static inline void race_result(struct race *race, const char *name)
{
	if (race->failed)
		ksft_print_msg("%s (seed %llu)\n", race->why, race->seed);
	ksft_test_result(!race->failed, "%s\n", name);
}

/* Zeroed memory that is shared with children; ends the program if there is none. */
static inline void *race_shared(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		ksft_exit_fail_msg("mmap: %s\n", strerror(errno));
	return p;
}

/**
 * race_child_result() - report a case that a child has run
 * @race: what it was run with
 * @name: of the case
 * @status: what cont_wait() returned; an exit status of KSFT_SKIP skips the case
 * @why: what the child said of why it failed, or skipped
 * @round: in which round
 */
static inline void race_child_result(struct race *race, const char *name, int status,
				     const char *why, unsigned long round)
{
	if (status > 0 && WIFEXITED(status) && WEXITSTATUS(status) == KSFT_SKIP) {
		ksft_test_result_skip("%s: %s\n", name, why);
		return;
	}
	race->failed = status;
	snprintf(race->why, sizeof(race->why), "%s (status 0x%x, round %lu)", why,
		 status, round);
	race_result(race, name);
}

#endif /* RACE_UTIL_H */
