# Sourced by the launch scripts, with their arguments: TEACHER STUDENT [key=value …] into $teacher, $student and
# "${settings[@]}", and what belongs to `minillm launch` into "${for_launch[@]}", for launch.sh:
#
#   --hostfile FILE   on all hosts of the file, a line "HOST slots=RANKS" each (docs/launching.md)
#   --dry-run         print the commands and the configuration, and start nothing
#   --ssh, --env, --limit, --master, --master-port as of `minillm launch --help`
#
# Options that it does not know are the command's: --fresh, --resume.
#
# The script has gone to the checkout by now, in one cd. What is a path of the user's own counts from where they stand:
# --hostfile, OUT, MINILLM_PYTHON, and CONFIG, which may count from the checkout, too, where none is found there. TEACHER,
# STUDENT and the paths in key=value count from the checkout, where the run works.
stands=$OLDPWD
script=scripts/${BASH_SOURCE[1]##*/}

# A path as it is to be called from the checkout.
from_there() {
  [[ $1 == /* || $stands == "$PWD" ]] && printf '%s' "$1" || printf '%s' "$stands/$1"
}

# A mistake in a line, and how to mend it in the other.
usage_fail() {
  printf '%s: %s\n  %s\n' "${script##*/}" "$1" "$2" >&2
  exit 2
}

for_launch=() words=()
while (($#)); do
  case $1 in
    -h | --help) sed -n '/^set -e/q; 2,$s/^# \{0,1\}//p' "$script" && exit ;;
    --hostfile | --ssh | --env | --limit | --master | --master-port)
      (($# > 1)) || usage_fail "$1 without a value" "wanted $1 VALUE; see docs/launching.md"
      value=$2
      [[ $1 != --hostfile ]] || value=$(from_there "$value")
      for_launch+=("$1" "$value")
      shift
      ;;
    --hostfile=*) for_launch+=("--hostfile=$(from_there "${1#*=}")") ;;
    --dry-run | --ssh=* | --env=* | --limit=* | --master=* | --master-port=*) for_launch+=("$1") ;;
    *) words+=("$1") ;;
  esac
  shift
done
usage="wanted: bash scripts/${script##*/} TEACHER STUDENT [key=value ...], cards, model folders or hub names; --help says more"
for place in 0 1; do
  word=${words[$place]:-}
  [[ -n $word ]] || usage_fail "got ${#words[@]} of TEACHER and STUDENT" "$usage"
  [[ $word != *=* && ($word != -* || $word == -) ]] || usage_fail "got $word where a model is wanted" "$usage"
done
teacher=${words[0]} student=${words[1]} settings=("${words[@]:2}")
[[ $student != - ]] || usage_fail "got no student" "$usage"
[[ $teacher != - || ${teacher_may_lack:-} ]] || usage_fail "got no teacher" "$usage"

[[ -z ${CONFIG:-} || ! -e $(from_there "$CONFIG") ]] || CONFIG=$(from_there "$CONFIG")
[[ -z ${OUT:-} ]] || OUT=$(from_there "$OUT")
[[ ${MINILLM_PYTHON:-} != */* ]] || MINILLM_PYTHON=$(from_there "$MINILLM_PYTHON")
