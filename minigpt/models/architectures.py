"""The architectures there is code for, by the `model_type` of config.json."""

from minigpt.models import bert, gpt2, gpt_neo, llama, roberta
from minigpt.models.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    "gpt_neo": gpt_neo.ARCHITECTURE,
    "gpt2": gpt2.ARCHITECTURE,
    "bert": bert.ARCHITECTURE,
    "roberta": roberta.ARCHITECTURE,
    **llama.ARCHITECTURES,
}
