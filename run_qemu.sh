#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Usage: ./run_qemu.sh [options]
#
# Build a Linux kernel for arm64 with this series, boot it in QEMU, run the series'
# selftests in it and say what they gave. With no option: Debian's linux-source-6.1,
# 4K pages, all tests. What is missing is installed first, if that can be done.
# All that is made goes under build/; what has not changed is used again.
#
# Kernel:
#   --base 6.1          kernel version of the series
#   --kernel DIR        your own tree (git or not) of that version, instead of Debian's.
#                       It is copied, never changed; it may have the series applied
#   --unpatched         the kernel without the series: its tests skip
#   --peer 6.12|newest|unpatched
#                       Debian's kernel of that version, with mainline's contpte, or the
#                       base alone, as bench/kernel builds it: no checks in it
#   --pages 4k|16k|64k  page size (4k)
#   --config FRAG       a config fragment on top of configs/*; may be repeated
# Tests:
#   --tests "NAME ..."  only these
#   --list              print the names and stop; gets the source and builds the tests first
#   --kernel-tests      also the kernel's own tests (selftests/vm), compared with what
#                       they give on an unpatched kernel
#   --repeat N          run them N times in one boot
#   --stress            not the tests, but a foreign load: groups of stress-ng's stressors
#                       (--list, --tests), and what they have left behind when they are
#                       gone ("leaks"); two rounds, or --repeat, but not one
#   --minutes N         how long, with --stress, all rounds together (5)
# Guest:
#   --cpu MODEL         QEMU's -cpu (max)
#   --smp N             CPUs (4)
#   --mem SIZE          memory (2G; 4G with 16k pages, 6G with 64k)
#   --tlbsim            under the TLB simulator (tools/tlbsim): what it reports, and
#                       tools/tlbsim/known (known-mainline with --peer) does not explain, is
#                       a failure
#   --timeout S         seconds a pass may take (600; 2400 with --kernel-tests or --tlbsim;
#                       with --stress there come all of --minutes)
#   --append "..."      more kernel parameters
#   --shell             a shell in the guest instead of the tests
#   --gdb               wait for gdb on port 1234, in a kernel with debug info
# Places:
#   --out DIR           where logs go (build/out/<kernel>)
#   --build DIR         where everything else goes (build/ here; no space or colon in it)
#
# Exit: 0 passed, 1 a test failed, 2 usage or set-up, 3 kernel trouble (it crashed,
# warned or hung). The last line is "N passed, N failed, N skipped".
. "$(dirname "$0")/scripts/lib.sh"

base=6.1 kernel='' unpatched='' peer='' pages=4k fragments=()
names='' list='' kernel_tests='' stress='' minutes='' repeat=''
cpu=max smp=4 mem='' timeout='' append='' shell='' gdb='' tlbsim='' out=''
while [ $# -gt 0 ]; do
	case $1 in
	--unpatched | --list | --kernel-tests | --stress | --shell | --gdb | --tlbsim)
		option=${1#--}
		printf -v "${option//-/_}" 1
		;;
	--base | --kernel | --peer | --pages | --repeat | --minutes | --cpu | --smp | --mem | --timeout | --append | --out)
		need_value "$@"
		printf -v "${1#--}" %s "$2"
		shift
		;;
	--tests) need_value "$@"; names+=" $2"; shift ;;
	--config) need_value "$@"; fragments+=("$2"); shift ;;
	--build) need_value "$@"; BUILD=$2; shift ;;
	-h | --help) usage ;;
	*) die "unknown option '$1' (see --help)" ;;
	esac
	shift
done

# What is wrong with the options is said before anything is fetched or built.
case $pages in
4k) mem=${mem:-2G} ;;
16k) mem=${mem:-4G} ;;
64k) mem=${mem:-6G} ;;
*) die "--pages takes 4k, 16k or 64k, not '$pages'" ;;
esac
# A kernel dies without a word on a CPU that lacks its page size.
case $pages:$cpu in
16k:cortex-a53* | 16k:cortex-a57* | 16k:cortex-a72*) die "${cpu%%,*} has no 16K pages (cortex-a35 has)" ;;
esac
for number in repeat minutes smp timeout; do
	[[ ${!number:-1} =~ ^[1-9][0-9]*$ ]] || die "--$number takes a number, not '${!number}'"
done
[[ $mem =~ ^[1-9][0-9]*[MG]?$ ]] || die "--mem takes megabytes, or a number with G, not '$mem'"
case $peer in
'') ;;
6.12 | newest | unpatched)
	[ -z "$kernel$unpatched$kernel_tests$gdb${fragments[*]}" ] ||
		die "--peer takes the kernel as it is: not with --kernel, --unpatched, --kernel-tests, --gdb or --config"
	;;
*) die "--peer takes 6.12, newest or unpatched, not '$peer'" ;;
esac
for f in "${fragments[@]}"; do [ -f "$f" ] || die "no such config fragment: $f"; done
names=$(xargs <<<"$names")
[ -z "$stress" ] || [ -z "$kernel_tests$shell" ] || die "--stress has no other tests and no shell beside it"
[ "${stress:+${repeat:-2}}" != 1 ] || die "--stress compares rounds: one is not enough"
[ -n "$stress" ] || [ -z "$minutes" ] || die "--minutes is for --stress"
minutes=${minutes:-5} repeat=${repeat:-$((stress ? 2 : 1))}
timeout=$((${timeout:-$((kernel_tests || tlbsim ? 2400 : 600))} * repeat + (stress ? minutes * 60 : 0)))
series=$(series_file "$base")
[ -z "$kernel" ] || check_tree "$kernel" "$base"

begin=$SECONDS
"$TOP/scripts/deps"
lock_build

# 1. The tree to boot, and the patched tree its tests come from
debian='' patched=$BUILD/tree/$base
if [ -n "$kernel" ]; then
	source=$(cd "$kernel" && pwd -P)
	name=$(tr -c '[:alnum:].\n' _ <<<"${source##*/}")-$(hash_of <<<"$source" | cut -c1-6)
	tree=$BUILD/tree/$name
else
	debian=$("$TOP/scripts/source" --base "$base")
	source=$debian name=$base tree=$patched
fi
if [ -n "$unpatched" ]; then
	name=$name-unpatched
	# The tests of an unpatched kernel come from the patched tree of Debian's source.
	debian=${debian:-$("$TOP/scripts/source" --base "$base")}
	"$TOP/scripts/patch" --base "$base" "$debian" "$patched"
	if [ -n "$kernel" ]; then
		tree=$tree-unpatched
		"$TOP/scripts/patch" --base "$base" --unpatched "$source" "$tree"
	else
		tree=$debian
	fi
else
	"$TOP/scripts/patch" --base "$base" "$source" "$tree"
	patched=$tree
fi

# 2. Its tests
tests=$BUILD/tests/${patched##*/} installs=()
if [ -n "$stress" ]; then
	known=$("$TOP/scripts/guest-stress" --list)
else
	known=$("$TOP/scripts/tests" --list "$patched" "$tests/mm" mm)
	installs=("$tests/mm/install")
fi
if [ -n "$list" ]; then
	echo "$known"
	exit
fi
for n in $names; do
	grep -qxF -- "$n" <<<"$known" || die "unknown test '$n'; known: $(xargs <<<"$known")"
done
if [ -n "$kernel_tests" ]; then
	{ read -r userland && read -r sysroot; } < <("$TOP/scripts/userland" --kernel-tests) || exit 2
	"$TOP/scripts/tests" --sysroot "$sysroot" "$tree" "$BUILD/tests/${tree##*/}/vm" vm
	installs+=("$BUILD/tests/${tree##*/}/vm/install")
	[ -z "$names" ] || names+=" $("$TOP/scripts/tests" --list --sysroot "$sysroot" "$tree" "$BUILD/tests/${tree##*/}/vm" vm | xargs)"
else
	userland=$("$TOP/scripts/userland" ${stress:+--stress})
fi

# 3. Kernel
if [ -n "$peer" ]; then
	image=$("$TOP/bench/kernel" --pages "$pages" "$peer")
	obj=${image%/arch/*}
	tree=$(cat "$obj/tree")
	debian=${tree##*/} name=$peer-$pages config=(bench) what=unpatched
	[ "$peer" = unpatched ] || base=$peer what="mainline's contpte in it"
else
	config=("$TOP"/configs/{base,pages-$pages,mm,checks}.config)
	[ -n "$unpatched" ] || config+=("$TOP"/configs/{contpte,hvo,tests}.config)
	[ -z "$gdb" ] || config+=("$TOP/configs/gdb.config")
	config+=("${fragments[@]}")
	name+=-$pages
	for f in ${gdb:+gdb.config} "${fragments[@]}"; do
		name+=+$(basename "$f" .config | tr -c '[:alnum:].\n' _)
	done
	obj=$BUILD/kernel/$name
	"$TOP/scripts/config" "$tree" "$obj" "${config[@]}"
	image=$("$TOP/scripts/build" "$tree" "$obj")
	if [ -n "$unpatched" ]; then
		what=unpatched
	elif grep -q '^config ARM64_CONTPTE' "$source/arch/arm64/Kconfig"; then
		what="series already in it"
	else
		what="$(patches_of "$series" | wc -l) patches"
	fi
fi

# 4. Guest
out=${out:-$BUILD/out/$name${tlbsim:+-tlbsim}${stress:+-stress}}
mkdir -p "$out" || die "cannot create $out"
out=$(cd "$out" && pwd -P)
seconds=$((minutes * 60 / repeat / $(wc -w <<<"${names:-$known}")))
"$TOP/scripts/initramfs" ${stress:+--stress $((seconds + !seconds))} ${shell:+--shell} --repeat "$repeat" --tests "$names" "$out" "$userland" "${installs[@]}"
{
	echo "kernel:  Linux $(version_of "$tree") from ${kernel:-linux-source-$base ${debian##*/}}, $what"
	echo "config:  $(basename -a -s .config "${config[@]}" | xargs) ($obj/.config)"
	echo "guest:   -cpu $cpu, $smp CPUs, $mem${append:+, $append}, $repeat pass(es); ready after $((SECONDS - begin)) s"
} >"$out/info"
say "ready: $((SECONDS - begin)) s"

boot=("$TOP/scripts/boot" --cpu "$cpu" --smp "$smp" --mem "$mem" --timeout "$timeout" --append "$append" ${gdb:+--gdb} ${tlbsim:+--tlbsim} ${shell:+--shell} "$image" "$out")
if [ -n "$shell" ]; then
	flock -u 9
	exec "${boot[@]}"
fi
# In the background, for a signal to reach it at once: a shell first waits for what
# is in its foreground.
setpriv --pdeathsig TERM "${boot[@]}" &
child=$!
trap 'kill "$child" 2>/dev/null; wait "$child"; exit 130' INT TERM HUP
wait "$child" || [ $? -eq 3 ] || exit 2
status=0
mainline=${peer#unpatched}
"$TOP/scripts/report" ${kernel_tests:+--known "$TOP/scripts/known-failures-$base"} ${mainline:+--mainline} "$out" || status=$?
exit "$status"
