/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The race of a speculative reference, get_page_unless_zero() on a page that is
 * becoming the tail of an optimized huge page, with the remapping of its struct page
 * to the read-only alias of the head's.
 *
 * The struct page reads as its own (mapped == OWN), with a refcount of its own, or as
 * a fake head (ALIAS): then it shows the refcount of the head, which is not 0, and
 * may not be written: a cmpxchg faults, even if its compare fails.
 *
 * Reader: in an RCU read-side section, the refcount is read and must not be 0; then it
 * must not be a fake head; then atomic_add_unless(). Updater: freezes the refcount at
 * 0, waits for a grace period, remaps; later it restores, which brings a page with
 * refcount 0, gives the page free and takes it again, twice over. Each access is one
 * step.
 *
 * Safety: no write to the read-only alias; the page is never remapped with a
 * reference on it; no process is stuck.
 *
 * Run: safety
 * Run: safety -DNR=3
 * Twin: assert -DNO_GRACE_PERIOD  # remapped right after the freeze
 * Twin: assert -DWRONG_ORDER      # fake head checked first, then the refcount
 * Twin: assert -DNO_FAKE_CHECK    # no check for a fake head
 * Twin: assert -DNO_PRECHECK      # fake head checked, atomic_add_unless() is the only read of the refcount
 * Twin: assert -DNO_RCU           # the checks and the write not in one read-side section
 * Twin: assert -DNO_FREEZE        # refcount not frozen at 0 before the grace period
 */
#ifndef NR
#define NR 2
#endif
#ifndef TRIES
#define TRIES 2
#endif
#define OWN		0
#define ALIAS		1
#define HEAD_REF	1

byte ref = 1;			/* of the page; the updater holds one */
bit mapped;
bit reading[NR];
byte gained;			/* references of the readers */

#define REF		(mapped == ALIAS -> HEAD_REF : ref)

inline add_unless_zero(c, ok)
{
	c = REF;
	do
	:: c == 0 -> break
	:: else ->
		atomic {
			assert(mapped == OWN);
			if
			:: ref == c -> ref++; gained++; ok = 1
			:: else -> c = ref
			fi
		};
		if
		:: ok -> break
		:: else
		fi
	od
}

active [NR] proctype reader()
{
	byte n, c;
	bit ok, good;

	do
	:: n < TRIES ->
#ifndef NO_RCU
		reading[_pid] = 1;
#endif
		good = 1;
#ifdef WRONG_ORDER
		good = (mapped == OWN);
#endif
#ifndef NO_PRECHECK
		if
		:: good -> good = (REF != 0)
		:: else
		fi;
#endif
#if !defined(WRONG_ORDER) && !defined(NO_FAKE_CHECK)
		if
		:: good -> good = (mapped == OWN)
		:: else
		fi;
#endif
		ok = 0;
		if
		:: good -> add_unless_zero(c, ok)
		:: else
		fi;
		reading[_pid] = 0;
		if
		:: ok -> atomic { ref--; gained-- }
		:: else
		fi;
		atomic { n++; c = 0; ok = 0; good = 0 }
	:: else -> break
	od
}

active proctype updater()
{
	byte round, i;

	do
	:: round < 2 ->
#ifndef NO_FREEZE
		/* Frozen only when there is no other reference. */
		atomic { ref == 1 -> ref = 0 };
#endif
#ifndef NO_GRACE_PERIOD
		i = 0;
		do
		:: i < NR -> !reading[i]; i++
		:: else -> break
		od;
#endif
		atomic { assert(gained == 0); mapped = ALIAS };
		/* Restore; the page is then given free and taken again. */
		atomic { mapped = OWN; ref = 0 };
		ref = 1;
		round++
	:: else -> break
	od
}
