"""Models as people keep them: a local folder or hub id, in sentence-transformers' layout or transformers' alone.

What the folder says counts: pooling, length, default prompt, truncation. What can't be run as it says is refused by name.
"""

from collections.abc import Mapping
from pathlib import Path

from gist_train.config.models import ModelConfig, StoredModelConfig
from gist_train.data.files import read_json
from gist_train.model import adapters
from gist_train.model.adapters import add_adapters, load_adapters, merge_adapters, refuse_other_base
from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.families import in_embedding
from gist_train.model.folders import PROMPTS_FILE, unfit
from gist_train.model.layers import keep_layers
from gist_train.model.pretrained import Pretrained
from gist_train.model.whole import TextModel


def load_student(config: ModelConfig, prompts: Mapping[str, str] | None = None) -> Pretrained:
    """The model to train, cut to `layers` and with `dropout` where these are given.

    Args:
        prompts: by name, for what its folder has none: the model is saved with them.

    Raises:
        UserError: no such model, or one that this package can't run.
    """
    student = _open("model", config, encodes_only=False)
    assert isinstance(student, Pretrained)
    transformer = student.encoder.transformer
    if config.layers is not None:
        keep_layers(transformer, config.layers)
    use_cheap_dropout(transformer, config.dropout)
    own = student.sentence_transformer.prompts
    own.update({name: prompt for name, prompt in (prompts or {}).items() if not own.get(name)})
    if (
        student.sentence_transformer.default_prompt_name is None
        and len({*(prompts or {}).values()}) == 1
        and len(prompts or {}) == 2
    ):
        student.sentence_transformer.default_prompt_name = "query"  # every text is trained with it
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(in_embedding(name) and config.lora is None)
    if config.lora is not None:
        add_adapters(transformer, config.lora)
    return student


def load_guide(config: StoredModelConfig, where: str = "guide") -> TextModel:
    """A frozen model, in eval mode: the guide, or what triplets are mined with.

    Args:
        where: its key in the YAML.

    Raises:
        UserError: no such model, or one that neither this package nor sentence-transformers can run.
    """
    return _frozen(_open(where, config, encodes_only=True))


def load_finished(folder_or_id: str, *, trust_remote_code: bool = False) -> TextModel:
    """A model to evaluate, as it is: an export, or any model of the hub, in eval mode.

    Args:
        trust_remote_code: whether Python code from its folder may run.
    """
    config = ModelConfig(name=folder_or_id, trust_remote_code=trust_remote_code)
    return _frozen(_open("--model", config, encodes_only=True))


def load_trained(folder: Path, config: ModelConfig) -> Pretrained:
    """A checkpoint or an average of some, in eval mode: what was trained from `config` runs the same code.

    Adapters are merged.
    """
    if (folder / adapters.WEIGHTS).is_file():
        trained = load_student(config)
        refuse_other_base(trained.encoder.transformer, folder)
        load_adapters(trained.encoder.transformer, folder)
        merge_adapters(trained.encoder.transformer)
        names = read_json(folder / PROMPTS_FILE)
        trained.sentence_transformer.prompts = names["prompts"]
        trained.sentence_transformer.default_prompt_name = names["default_prompt_name"]
        _frozen(trained)
        return trained
    model = load_finished(str(folder), trust_remote_code=config.trust_remote_code)
    if not isinstance(model, Pretrained):
        raise unfit("--model", str(folder), "modules that no training wrote", "a checkpoint", "name a checkpoint of the run")
    return model


def _frozen(model: TextModel) -> TextModel:
    if isinstance(model, Pretrained):
        model.encoder.eval()
    model.sentence_transformer.eval().requires_grad_(False)
    return model


def _open(where: str, config: ModelConfig | StoredModelConfig, *, encodes_only: bool) -> TextModel:
    from gist_train.model.opening import open_model  # brings sentence-transformers along, which takes seconds

    return open_model(where, config, encodes_only=encodes_only)
