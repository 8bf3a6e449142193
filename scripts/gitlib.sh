# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What scripts/tree, export, mbox and check share, sourced after lib.sh: git without
# the user's settings (what they write must not depend on whose machine it is), and
# what the patches touch.

unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY

# Through sudo the owner of the trees is not who runs git, hence safe.directory.
cgit() {
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_ATTR_NOSYSTEM=1 \
		git -c safe.directory='*' -c core.attributesFile=/dev/null \
		-c core.excludesFile=/dev/null -c gc.auto=0 "$@"
}

# Where scripts/tree keeps the tip that patches/ was last equal to
exported_ref=refs/series/exported

# tree_base TREE: the base it was made for; fails if scripts/tree did not make it
tree_base() {
	[ -e "$1/.git" ] && cgit -C "$1" config --local --get series.base
}

# tree_work TREE: what it holds that scripts/export has not written back, in words
tree_work() {
	local git
	git=$(cgit -C "$1" rev-parse --absolute-git-dir)
	if [ -e "$git/unfinished" ]; then
		echo "what a stopped scripts/tree left"
	elif [ -d "$git/rebase-apply" ] || [ -d "$git/rebase-merge" ]; then
		echo "a git am or rebase that is not finished"
	elif [ -n "$(cgit -C "$1" status --porcelain)" ]; then
		echo "changes that are not committed"
	elif [ "$(cgit -C "$1" rev-parse HEAD)" != "$(cgit -C "$1" rev-parse -q --verify "$exported_ref")" ]; then
		echo "commits that are not exported"
	fi
}

# touched PATCH...: every path that they change
touched() {
	[ $# -eq 0 ] || sed -n 's,^diff --git a/\(.*\) b/\1$,\1,p' "$@" | sort -u
}

# added PATCH...: the paths that they add
added() {
	[ $# -eq 0 ] || awk '/^diff --git / { path = substr($4, 3) }
		/^new file mode / { print path }' "$@" | sort -u
}
