/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A batch of vmemmap entries (one, or ENTRIES), changed again and again by cooperative
 * break-before-make, while CPUs with a TLB of one entry each read through them and help.
 *
 * The pages: 0 old, 1 the head page, 2 the page of a restore. An entry goes 0 -> 1
 * (optimize), 1 -> 2 (restore), 2 -> 1 (optimize again, with the descriptor of the first
 * time), and the pages 0 and 2 are freed when they are no longer mapped.
 *
 * CPU 0 runs the updater, and an interrupt on it that reads like the others: while it
 * is in it, the updater stands still. A TLBI reaches the CPUs one by one. A step is
 * sequentially consistent: the barriers are the business of the *.litmus files.
 *
 * Safety: no CPU reads a freed page; when one CPU has read the new page of a change,
 * none reads the old page; no process is stuck. Liveness (ltl done, weak fairness):
 * the updater ends and each CPU ends its reads.
 *
 * Run: safety -DREADS=3
 * Run: safety -DNR=3 -DREADS=1
 * Run: safety -DENTRIES=2 -DNR=1 -DREADS=3
 * Run: safety -DENTRIES=2 -DREADS=1 -DCHANGES=1
 * Run: live
 * Run: safety -DQUIESCE
 * Run: safety -DQUIESCE -DENTRIES=2 -DNR=1
 * Run: live -DQUIESCE -DNR=1
 * Run: safety -DMAKE_STORE -DNR=1  # plain store in the make: breaks nothing in this model
 * Twin: assert -DNO_DRAIN                      # ABA: a stalled helper completes a later break
 * Twin: assert -DHELPER_NO_TLBI                # helper does not flush
 * Twin: assert -DUPDATER_NO_TLBI               # updater does not flush
 * Twin: assert -DFREE_EARLY                    # page freed between break and flush
 * Twin: assert -DENTRIES=2 -DFREE_ON_HELP      # batch not flushed when a helper was there first
 * Twin: assert -DNO_BREAK                      # new address written over a valid entry
 * Twin: stuck -DWAIT_LOCK                      # the fault waits for the lock of the updater
 * Twin: live -DNR=1 -DNO_HELP                  # the fault just retries
 * Twin: assert -DQUIESCE -DQ_NO_TLBI           # access flag cleared, no flush
 * Twin: assert -DQUIESCE -DQ_STORE             # access flag cleared, store, no cmpxchg
 */
#ifndef NR
#define NR 2			/* CPUs besides that of the updater */
#endif
#ifndef READS
#define READS 2			/* reads of each CPU */
#endif
#ifndef CHANGES
#define CHANGES 3
#endif
#ifndef ROUNDS
#define ROUNDS 2		/* of quiescing, before it breaks the entry */
#endif
#ifndef ENTRIES
#define ENTRIES 1		/* of a batch, at most 2 */
#endif
#define CPUS		(NR + 1)
#define NONE		9

#define PAGE(d)		((d) & 3)
#define VALID		4
#define MARK		8
#define AF		16

byte pte[ENTRIES] = VALID | AF;	/* page 0 */
byte tlb[CPUS] = NONE;		/* page, or NONE */
byte tlb_entry[CPUS];		/* of which entry */
bit freed[ENTRIES * 3];
byte old_page = NONE, new_page;	/* of the change under way or last done */
bit seen_new[ENTRIES];
bit helping[CPUS];		/* preemption off: what the drain waits for */
bit irq;			/* CPU 0 is in its interrupt */
bit locked;			/* the updater is in its window */
byte ended;

#define ALWAYS		1
#define NOT_IN_IRQ	(!irq)		/* what each step of the updater waits for */
#define HIT(me, e)	(tlb[me] != NONE && tlb_entry[me] == e)

/* Drop the translations of each CPU i for which "which" holds. */
inline tlbi(i, go, which)
{
	i = 0;
	do
	:: atomic { go && i < CPUS ->
		if
		:: which -> tlb[i] = NONE
		:: else
		fi;
		i++ }
	:: i >= CPUS -> break
	od
}

/* One read. A translation of an earlier read may still be there, or not. */
inline read_page(me, e, p, d, i)
{
#if ENTRIES > 1
	if
	:: e = 0
	:: e = 1
	fi;
#endif
	if
	:: tlb[me] = NONE
	:: skip
	fi;
	do
	/* The walker, as one atomic step; the hardware manages the access flag. */
	:: atomic { !HIT(me, e) && (pte[e] & VALID) ->
		pte[e] = pte[e] | AF;
		tlb[me] = PAGE(pte[e]);
		tlb_entry[me] = e }
	:: atomic { !HIT(me, e) && !(pte[e] & VALID) -> helping[me] = 1 };
		fault(e, d, i);
		helping[me] = 0
	:: atomic { HIT(me, e) ->
		p = tlb[me];
		assert(!freed[e * 3 + p]);
		assert(!(seen_new[e] && p == old_page));
		seen_new[e] = seen_new[e] || p == new_page;
		p = 0 };
		break
	od
}

inline fault(e, d, i)
{
#if defined(WAIT_LOCK)
	!locked;
#elif defined(NO_HELP)
	skip;
#else
	d = pte[e];
	if
	:: d & MARK ->
#ifndef HELPER_NO_TLBI
		tlbi(i, ALWAYS, tlb_entry[i] == e);
#endif
		atomic {
			if
			:: pte[e] == d -> pte[e] = PAGE(d) | VALID | AF
			:: else
			fi
		}
	:: else			/* valid by now */
	fi;
#endif
	atomic { d = 0; i = 0 }
}

/* Do "what" to each entry e, as a step of its own. */
#define EACH(e, what)						\
	e = 0;							\
	do							\
	:: atomic { NOT_IN_IRQ && e < ENTRIES -> what; e++ }	\
	:: e >= ENTRIES -> break				\
	od

#define FREE		if :: old_page != 1 -> freed[e * 3 + old_page] = 1 :: else fi
#define WAS_OLD		(PAGE(pte[e]) == old_page)
#define BREAK		if :: WAS_OLD -> pte[e] = new_page | BROKEN :: else fi
#ifdef MAKE_STORE
#define MAKE		pte[e] = new_page | VALID | AF
#else
#define MAKE		if :: pte[e] == (new_page | MARK) -> pte[e] = new_page | VALID | AF :: else fi
#endif
#define CLEAR_AF	if :: WAS_OLD -> pte[e] = old_page | VALID :: else fi
#ifdef Q_STORE
#define REPLACE		pte[e] = new_page | VALID | AF
#else
#define REPLACE		if :: pte[e] == (old_page | VALID) -> pte[e] = new_page | VALID | AF :: else fi
#endif
#ifdef NO_BREAK
#define BROKEN		VALID | AF
#else
#define BROKEN		MARK
#endif

active proctype updater()
{
	byte change, e, i, round;
	bit helped;

	do
	:: change < CHANGES ->
#ifndef NO_DRAIN
		/* A grace period: each helper that there is now comes to its end. */
		i = 0;
		do
		:: atomic { NOT_IN_IRQ && i < CPUS && !helping[i] -> i++ }
		:: i >= CPUS -> break
		od;
#endif
		atomic { NOT_IN_IRQ ->
			old_page = PAGE(pte[0]);
			new_page = (change == 1 -> 2 : 1);
			seen_new[0] = 0;
#if ENTRIES > 1
			seen_new[1] = 0;
#endif
			round = 0 };
#ifdef QUIESCE
		do
		:: round < ROUNDS ->
			EACH(e, CLEAR_AF);
#ifndef Q_NO_TLBI
			tlbi(i, NOT_IN_IRQ, 1);
#endif
			EACH(e, REPLACE);
			round++
		:: break
		od;
#endif
		atomic { NOT_IN_IRQ -> locked = 1 };
		EACH(e, BREAK);
#ifdef FREE_EARLY
		EACH(e, FREE);
#endif
#ifdef FREE_ON_HELP
		atomic { NOT_IN_IRQ -> helped = (pte[0] & VALID) != 0 };
#endif
#ifndef UPDATER_NO_TLBI
		if
		:: !helped -> tlbi(i, NOT_IN_IRQ, 1)
		:: else
		fi;
#endif
		EACH(e, MAKE);
		atomic { NOT_IN_IRQ -> locked = 0 };
		EACH(e, FREE);
		change++
	:: else -> break
	od;
	ended++
}

active [NR] proctype cpu()
{
	byte n, e, p, d, i;

	do
	:: n < READS -> read_page(_pid, e, p, d, i); n++
	:: else -> break
	od;
	ended++
}

active proctype interrupt()
{
	byte n, e, p, d, i;

	do
	:: n < READS -> irq = 1; read_page(0, e, p, d, i); irq = 0; n++
	:: else -> break
	od;
	ended++
}

#ifdef LIVE
ltl done { <>(ended == CPUS + 1) }
#endif
