"""The files of a new model that are not copied from another one."""

from __future__ import annotations

from string import Template

README = Template("""\
# $title

$model started as a copy of $like (`torchtitan new $model`). It trains and verifies as it is; make
it your model one change at a time, and verify after each.

```sh
torchtitan train --job.config_file $configs/debug_model.toml
torchtitan verify $model$verify_import --quick
```

| file | what is in it |
|---|---|
| `model/args.py` | sizes; counts of parameters and FLOPs; from and to `config.json` |
| `model/model.py` | the model, for one device |
| `model/state_dict_adapter.py` | names of its tensors in Hugging Face checkpoints |
| `infra/parallelize.py` | tensor, context and data parallelism, activation checkpointing, compile |
| `infra/pipeline.py` | pipeline stages |
| `train_configs/` | training runs |
| `__init__.py` | flavors and registration |
$notes""")

HF_NOTES = Template("""
## From Hugging Face

Flavor `$flavor` has the sizes of `$path`.
$findings
Compare with the original, layer by layer:

```sh
torchtitan verify $model$verify_import --flavor $flavor --hf $path --only adapter
```
""")

FULL_TOML = Template("""\
# A start for a real run: set the tokenizer, the sizes of the batch and the learning rate.

[job]
dump_folder = "./outputs/$model"
description = "$title $flavor on C4"
$custom_import
[model]
name = "$model"
flavor = "$flavor"
tokenizer_path = "$path"

[optimizer]
name = "AdamW"
lr = 3e-4

[lr_scheduler]
warmup_steps = 2000
decay_type = "cosine"
min_lr_factor = 0.1

[training]
dataset = "c4"
local_batch_size = 1
global_batch_size = 512
seq_len = 4096
steps = 40000

[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 1

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[compile]
enable = true

[checkpoint]
enable = true
interval = 500
async_mode = "async"
""")

TEST = Template('''\
"""What `torchtitan verify $model --quick` checks, as tests: `pytest $test`."""

from torchtitan.authoring import conformance_tests

test_conformance = conformance_tests("$model"$custom_import, quick=True)
''')

PYPROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$model"
version = "0.1.0"
description = "$title for torchtitan"
requires-python = ">=3.11"
dependencies = ["torchtitan"]

[project.optional-dependencies]
dev = ["pytest"]

# Once this package is installed, torchtitan knows the model by its name.
[project.entry-points."torchtitan.models"]
$model = "$model:get_train_spec"

[tool.setuptools.packages.find]
include = ["$model*"]

[tool.setuptools.package-data]
$model = ["train_configs/*.toml", "README.md"]

[tool.pytest.ini_options]
pythonpath = ["."]
""")
