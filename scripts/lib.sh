# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What the scripts here share. Each starts with: . "$(dirname "$0")/lib.sh"
#
# The result of a script goes to stdout, what it says about itself to stderr.
# Exit: 0 good, 1 a test failed, 2 usage or set-up, 3 kernel trouble.

set -euo pipefail
export LC_ALL=C
# With CDPATH cd prints where it went; make would look for the jobs of a make above it.
unset CDPATH MAKEFLAGS MFLAGS MAKELEVEL
# Ctrl-C reaches what runs below this script as well. That may end as if it had failed,
# which is not for this script to go on from.
trap 'exit 130' INT

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
export BUILD=${BUILD:-$TOP/build}
CROSS=aarch64-linux-gnu-
# shellcheck disable=SC2034  # read by the scripts that source this
ARM64_MAKE=(--no-print-directory ARCH=arm64 "CROSS_COMPILE=$CROSS")

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 2; }

# The help of a script is the comment at its top.
usage() { sed -n '2,/^[^#]/{/^# SPDX/d;s/^# \{0,1\}//p}' "$0"; exit 0; }

# need_value OPTION [VALUE...]: die unless a value follows
need_value() { [ $# -ge 2 ] || die "$1 needs a value (see --help)"; }

hash_of() { sha256sum | cut -c1-16; }

# make_tmp: make a directory for a while, and print its path
make_tmp() {
	local dir
	dir=$(mktemp -d 2>/dev/null) || die "cannot make a directory in ${TMPDIR:-/tmp} (TMPDIR)"
	(cd "$dir" && pwd -P)
}

# The kernel's make takes no space or colon in a path, so build/ may have none.
prepare_build() {
	case $BUILD in
	'') die "--build needs the name of a directory" ;;
	*[[:space:]:]*) die "the kernel's make takes no space or colon in '$BUILD': name another place with --build DIR" ;;
	/*) ;;
	*) BUILD=$PWD/$BUILD ;;
	esac
	mkdir -p "$BUILD" 2>/dev/null || die "cannot create $BUILD"
	[ -w "$BUILD" ] || die "cannot write to $BUILD"
	BUILD=$(cd "$BUILD" && pwd -P)
}

# lock FD DIR: wait until no other run uses DIR. FD is open on DIR/lock, by whoever
# this script starts, too: what a killed run left running still counts.
lock() {
	local holder
	if ! flock -n "$1"; then
		holder=$(tail -n 1 "$2/lock")
		if [ -d "/proc/$holder" ]; then
			say "${0##*/}: another run (process $holder) is using $2: waiting for it"
		else
			say "${0##*/}: what a run that is gone (process $holder) left running is using $2: waiting for it"
		fi
		flock "$1"
	fi
	echo $$ >"$2/lock"
}

# lock_dir DIR: the same for an object directory, or another one that is not build/
lock_dir() {
	{ exec 8>>"$1/lock"; } 2>/dev/null || die "cannot write to $1/lock"
	lock 8 "$1"
}

# One run at a time in build/: the second says so and waits. A script called by a
# script that holds the lock goes on.
lock_build() {
	prepare_build
	[ "${BUILD_LOCK:-}" != "$BUILD" ] || return 0
	{ exec 9>>"$BUILD/lock"; } 2>/dev/null || die "cannot write to $BUILD/lock"
	lock 9 "$BUILD"
	export BUILD_LOCK=$BUILD
}

# free_kb DIR: what is free there; plenty if the file system does not tell
free_kb() {
	local free
	free=$(df --output=avail -k "$1" 2>/dev/null | tail -n 1) || true
	[[ $free =~ ^\ *[0-9]+$ ]] || free=$((1 << 40))
	echo $((free))
}

# need_space GB DIR
need_space() {
	local free
	free=$(free_kb "$2")
	[ "$free" -ge $(($1 * 1024 * 1024)) ] ||
		die "$2 has $((free / 1024)) MB free, this needs $1 GB: free some, or name another place with --build DIR"
}

# moving_line NAME LOG: how long it has taken, and the end of LOG, over and over
moving_line() {
	local columns line start=$SECONDS
	while kill -0 $$ 2>/dev/null; do
		# A longer line than the terminal's could not be taken back.
		columns=$(stty size <&2 2>/dev/null | cut -d' ' -f2)
		[ "${columns:-0}" -gt 0 ] || columns=80
		printf -v line '%s: %d s  %.50s' "$1" $((SECONDS - start)) "$(tail -n 1 "$2" | tr -cd '[:print:]')"
		printf '\r\033[K%s' "${line:0:columns-1}" >&2
		sleep 0.5
	done
}

# no_full_disk DIR...: end here if one is full
no_full_disk() {
	local dir
	for dir; do
		[ "$(free_kb "$dir")" -ge 1024 ] || die "no space left in $dir: free some"
	done
}

# step NAME LOG COMMAND...: run a long command with its output in LOG. On a terminal
# a line moves while it runs; in a log there is one line when it is done. In a
# function given as COMMAND errexit is off: chain its commands with &&. It sees the
# variables of this one in place of its script's.
step() {
	local name=$1 log=$2 start=$SECONDS status=0 mover=
	shift 2
	{ mkdir -p "${log%/*}" && : >"$log"; } 2>/dev/null || die "cannot write to $log"
	if [ -t 2 ] && [ "${TERM:-dumb}" != dumb ]; then
		moving_line "$name" "$log" 8>&- 9>&- &
		mover=$!
	fi
	"$@" >"$log" 2>&1 </dev/null || status=$?
	if [ -n "$mover" ]; then
		kill "$mover" 2>/dev/null || true
		wait "$mover" 2>/dev/null || true
		printf '\r\033[K' >&2
	fi
	if [ "$status" -eq 0 ]; then
		say "$name: $((SECONDS - start)) s"
	else
		say "$name: failed after $((SECONDS - start)) s; from $log:"
		{
			grep -E -m 8 '^ *(FAIL|failed:|not ok|[^ ]*:[0-9:]* (fatal )?error:) ' "$log" || tail -n 12 "$log"
			tail -n 1 "$log"
		} | sed 's/^/    /' >&2
		no_full_disk "${log%/*}" "${TMPDIR:-/tmp}"
	fi
	return "$status"
}

# apt with a state of its own under build/ and arm64 as its architecture, reading
# the machine's own sources: needs no root and leaves the host's dpkg alone.
apt_arm64() {
	local tool=$1 state=$BUILD/apt
	shift
	mkdir -p "$state/lists/partial" "$state/archives/partial" "$state/empty"
	: >>"$state/status"
	"$tool" -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User= \
		-o Dir::State="$state" -o Dir::State::lists="$state/lists" \
		-o Dir::State::status="$state/status" -o Dir::Cache="$state" \
		-o Dir::Cache::archives="$state/archives" -o Dir::Etc::preferencesparts="$state/empty" \
		-o APT::Get::List-Cleanup=0 -o Debug::NoLocking=1 "$@"
}

# apt_suites STATE "SUITE..." TOOL ARGS...: apt with a state of its own that knows only
# these suites of Debian, from the mirror that the machine has for its own
apt_suites() {
	local state=$1 suites=$2 tool=$3 site suite
	shift 3
	site=$(apt-get indextargets --format "\$(REPO_URI) \$(COMPONENT)" 'Created-By: Packages' |
		awk '$1 ~ /\/debian\/?$/ && $2 == "main" { print $1; exit }') &&
		[ -n "$site" ] &&
		mkdir -p "$state/lists/partial" "$state/archives/partial" "$state/empty" &&
		touch "$state/status" || return
	for suite in $suites; do
		echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site $suite main"
	done >"$state/sources.list"
	"$tool" -q -o Dir::State="$state" -o Dir::State::lists="$state/lists" \
		-o Dir::State::status="$state/status" -o Dir::Cache="$state" \
		-o Dir::Cache::archives="$state/archives" -o Dir::Etc::sourcelist="$state/sources.list" \
		-o Dir::Etc::sourceparts="$state/empty" -o Dir::Etc::preferencesparts="$state/empty" \
		-o APT::Sandbox::User= -o Debug::NoLocking=1 "$@"
}

# apt_lists [STATE APT...]: fetch the package lists, of apt_arm64 or of an APT that has its
# state there, at most once a day. Old lists do when there is no network.
apt_lists() {
	[ $# -gt 0 ] || set -- "$BUILD/apt" apt_arm64
	local stamp=$1/updated
	shift
	[ -z "$(find "$stamp" -mmin -1440 2>/dev/null)" ] || return 0
	# On a full disk apt-get does not end.
	need_space 1 "$BUILD"
	if step "package lists" "$BUILD/log/apt-update" "$@" apt-get update &&
		! grep -q '^Err:' "$BUILD/log/apt-update"; then
		touch "$stamp"
	elif [ -e "$stamp" ]; then
		say "package lists: no network? going on with those of $(date -r "$stamp" +%F)"
	fi
}

# version_of DIR: the version in a kernel tree's Makefile
version_of() {
	awk '$2 == "=" && $1 ~ /^(VERSION|PATCHLEVEL|SUBLEVEL)$/ { v = v "." $3 }
	     $1 == "SUBLEVEL" { print substr(v, 2); exit }' "$1/Makefile"
}

# check_tree DIR BASE: die unless DIR is a kernel tree of that version
check_tree() {
	local f version
	[ -d "$1" ] || die "no such directory: $1"
	for f in Makefile Kconfig mm/memory.c arch/arm64/Kconfig; do
		[ -f "$1/$f" ] || die "not a kernel tree: $1 has no $f"
	done
	version=$(version_of "$1")
	case $version in
	"$2".*) ;;
	*) die "$1 is Linux $version, and the series is for $2" ;;
	esac
}

# series_file BASE: the series of a base; the default base's is called just "series"
series_file() {
	local f
	for f in "$TOP/series.$1" "$TOP/series"; do
		if [ -e "$f" ] && grep -q "^$1/" "$f"; then
			echo "$f"
			return
		fi
	done
	die "no series for base $1; there is one for: $(sed -n 's,^\([0-9.]*\)/.*,\1,p' "$TOP"/series "$TOP"/series.* 2>/dev/null | sort -uV | xargs)"
}

# patches_of SERIES: its patch files, in order
patches_of() { awk -v dir="$TOP/patches/" '/^[^#]/ { print dir $1 }' "$1"; }
