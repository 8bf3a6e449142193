#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Report what the KUnit suite contpte found when this kernel booted.
#
# Claim: each case of arch/arm64/mm/contpte_kunit.c passed, and none is missing.
# Oracle: the suite's results in debugfs, CONFIG_KUNIT_DEBUGFS.
# Breaks on: page table operations that do not do to contiguous mappings, or to the
# TLB, what the model in that file says.
#
# Needs CONFIG_ARM64_CONTPTE_KUNIT_TEST, otherwise it skips.

exec "$(dirname "$0")/kunit_report.sh" contpte CONFIG_ARM64_CONTPTE_KUNIT_TEST
