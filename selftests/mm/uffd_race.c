// SPDX-License-Identifier: GPL-2.0-only
/*
 * Minor faults of userfaultfd in blocks that are folded and unfolded.
 *
 * UFFDIO_CONTINUE maps one page after the other, and the last of a block folds it;
 * MADV_DONTNEED of one page unfolds it again. Both take all entries of the block
 * away for a moment. Whoever faults then must not be taken for somebody who needs
 * a page that user space has not mapped yet.
 *
 * Claim: accesses to pages that were continued succeed.
 *
 * Oracle: with UFFD_FEATURE_SIGBUS a page that user space has yet to map is SIGBUS
 * for a program, and EFAULT for a system call; contents.
 *
 * Breaks on: asking user space for a page whose entry was read without the lock.
 */
#include "contpte_harness.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <linux/userfaultfd.h>

#define NR_READERS	3
#define ROUNDS		500

FIXTURE(uffd)
{
	struct cont_map map;
	int uffd;
};

FIXTURE_SETUP(uffd)
{
	self->uffd = -1;
	cont_setup(_metadata, &self->map, CONT_SHMEM, 1, 0, 0);
}

FIXTURE_TEARDOWN(uffd)
{
	if (self->uffd >= 0)
		close(self->uffd);
	cont_map_free(&self->map);
}

static bool uffd_continue(int uffd, char *at, size_t len)
{
	struct uffdio_continue cont = {
		.range.start = (unsigned long)at, .range.len = len,
	};

	return !ioctl(uffd, UFFDIO_CONTINUE, &cont);
}

struct reader {
	pthread_t tid;
	const char *view;
	size_t page;
	unsigned int nr;	/* of pages that are there all the time */
	bool *stop;
	long sigbus, efault, other;
};

static __thread sigjmp_buf on_sigbus;

static void sigbus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)info;
	(void)context;
	siglongjmp(on_sigbus, 1);
}

static void *read_pages(void *arg)
{
	struct reader *r = arg;
	unsigned int i = 0;
	int fd = memfd_create("uffd_race", MFD_CLOEXEC);

	while (!__atomic_load_n(r->stop, __ATOMIC_RELAXED)) {
		const char *at = r->view + i++ % r->nr * r->page;

		if (sigsetjmp(on_sigbus, 1)) {
			r->sigbus++;
			continue;
		}
		cont_load(at);
		if (pwrite(fd, at, sizeof(__u64), 0) != sizeof(__u64)) {
			if (errno == EFAULT)
				r->efault++;
			else
				r->other++;
		}
	}
	close(fd);
	return NULL;
}

CONT_TEST_F(uffd, mapped_is_not_missing)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_SIGBUS,
	};
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MINOR };
	struct reader readers[NR_READERS];
	char *view, *last;
	long long before;
	bool stop = false;
	unsigned int i;

	self->uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (self->uffd < 0)
		SKIP(return, "userfaultfd: %s", strerror(errno));
	if (ioctl(self->uffd, UFFDIO_API, &api))
		SKIP(return, "userfaultfd has no minor faults of shmem: %s",
		     strerror(errno));
	/* Another view of the window, whose pages are mapped when we say so */
	view = cont_map_view(m, m->off, m->len, 0, PROT_READ | PROT_WRITE, MAP_SHARED);
	ASSERT_NE(MAP_FAILED, view);
	last = view + m->len - m->page;
	reg.range.start = (unsigned long)view;
	reg.range.len = m->len;
	ASSERT_EQ(0, ioctl(self->uffd, UFFDIO_REGISTER, &reg));
	cont_on_fault(sigbus);
	ASSERT_TRUE(uffd_continue(self->uffd, view, m->len));
	ASSERT_TRUE(cont_all_folded(view, m->len));
	before = cont_vmstat("contpte_unfold");

	memset(readers, 0, sizeof(readers));
	for (i = 0; i < NR_READERS; i++) {
		readers[i].view = view;
		readers[i].page = m->page;
		readers[i].nr = m->nr_pages - 1;
		readers[i].stop = &stop;
		ASSERT_EQ(0, pthread_create(&readers[i].tid, NULL, read_pages,
					    &readers[i]));
	}
	for (i = 0; i < ROUNDS; i++) {
		if (madvise(last, m->page, MADV_DONTNEED) ||
		    !uffd_continue(self->uffd, last, m->page))
			break;
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	EXPECT_EQ(ROUNDS, i)
		TH_LOG("%s", strerror(errno));
	for (i = 0; i < NR_READERS; i++) {
		pthread_join(readers[i].tid, NULL);
		EXPECT_EQ(0, readers[i].sigbus);
		EXPECT_EQ(0, readers[i].efault);
		EXPECT_EQ(0, readers[i].other);
	}
	/* Were there moments to be hit? */
	EXPECT_GE(cont_vmstat("contpte_unfold") - before, ROUNDS);
	EXPECT_TRUE(cont_all_folded(view, m->len));
	EXPECT_EQ(0, cont_bad_at(m, view, 0, m->nr_pages, 0));
}

TEST_HARNESS_MAIN
