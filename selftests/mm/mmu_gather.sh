#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Report what the KUnit suite mmu_gather found when this kernel booted.
#
# Claim: each case of mm/mmu_gather_kunit.c passed, and none is missing.
# Oracle: the suite's results in debugfs, CONFIG_KUNIT_DEBUGFS.
# Breaks on: a mmu_gather that does not flush all that it has to.
#
# Needs CONFIG_MMU_GATHER_KUNIT_TEST, otherwise it skips.

exec "$(dirname "$0")/kunit_report.sh" mmu_gather CONFIG_MMU_GATHER_KUNIT_TEST
