#!/usr/bin/env bash
# transformers shows a chat template reasoning under keys that the message does not have.
#
# Seen with transformers 5.24.0: whichever of `reasoning_content`, `reasoning` and `thinking` an
# assistant's message has, a chat template finds it as `reasoning_content` and as `thinking`, but as
# `reasoning` only where it is called so. A template that reads `thinking` therefore writes, and trains,
# text that a row holds under another name; transformers 4.57.6 gives each key to the template as it is.
# Expected: the message as it is.
set -euo pipefail
versions=(4.57.6 5.24.0)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >program.py <<'PROGRAM'
from transformers.utils.chat_template_utils import render_jinja_template

KEYS = ("reasoning_content", "reasoning", "thinking")
seen = "{% for m in messages %}{% for k in m %}{% if m[k] == 'because' %}{{ k }} {% endif %}{% endfor %}{% endfor %}"
for key in KEYS:
    answer = {"role": "assistant", "content": "yes", key: "because"}
    (text,), _ = render_jinja_template([[{"role": "user", "content": "?"}, answer]], chat_template=seen)
    print(key, "is seen as", sorted(text.split()))
PROGRAM
for version in "${versions[@]}"; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "transformers==$version" jinja2==3.1.6
  echo "transformers $version" >>seen
  "$folder/$version/bin/python" program.py 2>log >>seen || { cat log >&2; exit 1; }
done
cat >expected <<'EXPECTED'
transformers 4.57.6
reasoning_content is seen as ['reasoning_content']
reasoning is seen as ['reasoning']
thinking is seen as ['thinking']
transformers 5.24.0
reasoning_content is seen as ['reasoning_content', 'thinking']
reasoning is seen as ['reasoning', 'reasoning_content', 'thinking']
thinking is seen as ['reasoning_content', 'thinking']
EXPECTED
python3 --version
cat seen
diff expected seen
