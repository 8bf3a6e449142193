#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Usage: kunit_report.sh SUITE CONFIG
#
# Report what the KUnit suite SUITE found when this kernel booted, in TAP. Skips if
# its results are not in debugfs: it needs the options CONFIG and
# CONFIG_KUNIT_DEBUGFS. A case that left no result counts as failed.
#
# For the test scripts of the suites, which say what they claim.

[ $# = 2 ] || { echo "Usage: ${0##*/} SUITE CONFIG" >&2; exit 1; }
suite=$1
config=$2

ksft_pass=0
ksft_fail=1
ksft_skip=4

debugfs=
mounted=

# shellcheck disable=SC2317 # called by the trap
cleanup()
{
	[ -n "$mounted" ] && umount "$debugfs" && rmdir "$debugfs"
}

skip()
{
	echo "1..0 # SKIP $1"
	exit $ksft_skip
}

echo "TAP version 13"
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

[ "$(id -u)" = 0 ] || skip "needs root"
while read -r _ dir type _; do
	[ "$type" = debugfs ] && debugfs=$dir
done < /proc/mounts
if [ -z "$debugfs" ]; then
	debugfs=$(mktemp -d) || skip "no place to mount debugfs"
	if ! mount -t debugfs none "$debugfs" 2> /dev/null; then
		rmdir "$debugfs"
		skip "kernel has no debugfs"
	fi
	mounted=y
fi

results=$debugfs/kunit/$suite/results
[ -r "$results" ] ||
	skip "no KUnit suite $suite ($config, CONFIG_KUNIT_DEBUGFS)"
# Once, and whole: a pipe would take the counts below into a subshell.
log=$(cat "$results") || skip "cannot read $results"

planned=0
cases=0
failed=0
skipped=0

# KUnit cuts what a case says after some 500 bytes, and its result comes last.
missing()
{
	while [ $cases -lt "$1" ]; do
		cases=$((cases + 1))
		failed=$((failed + 1))
		echo "not ok $cases $suite case $cases left no result"
	done
}

# The cases are what is indented by four, with numbers from 1 on.
while IFS= read -r line; do
	case $line in
	"    1.."*)
		planned=${line#*..}
		echo "1..$planned"
		;;
	"    ok "* | "    not ok "*)
		nr=${line#*ok }
		missing $((${nr%% *} - 1))
		cases=$((cases + 1))
		case $line in
		*"# SKIP"*) skipped=$((skipped + 1)) ;;
		*"not ok "*) failed=$((failed + 1)) ;;
		esac
		echo "${line#    }"
		;;
	"" | "1.."* | "# "* | "ok "* | "not ok "*)
		;;
	"KTAP version "* | "    KTAP version "* | "    # Subtest: "*)
		;;
	*)
		# why a case failed
		echo "# ${line#    }"
		;;
	esac
done << END
$log
END

[ "$planned" -gt 0 ] || skip "$results has no plan"
missing "$planned"
passed=$((cases - failed - skipped))
echo "# Totals: pass:$passed fail:$failed xfail:0 xpass:0 skip:$skipped error:0"

[ $failed = 0 ] || exit $ksft_fail
[ $skipped -lt $cases ] || exit $ksft_skip
exit $ksft_pass
