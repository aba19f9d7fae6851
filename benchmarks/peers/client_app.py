"""The clients of the plain Flower app: the model is built in every call, as in the template, or kept."""

from functools import cache
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.peers.task import encode, get_model, get_trainer, load_partition

app = ClientApp()


@cache
def kept_model(*settings: tuple[str, Any]) -> Any:
    """The model of this process, built in its first call."""
    return get_model(dict(settings))


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the adapter that came on this client's rows, and send it back."""
    settings: Any = dict(msg.content["config"])
    arrays: Any = msg.content["arrays"]
    partition, partitions = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    examples = encode(load_partition(partition, partitions, settings["data"]), settings)
    same = {key: value for key, value in settings.items() if key != "server-round"}
    model = kept_model(*sorted(same.items())) if settings["keep-model"] else get_model(settings)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    result = get_trainer(model, settings, examples).train()
    told = MetricRecord({"train_loss": result.training_loss, "num-examples": len(examples)})
    content = RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": told})
    return Message(content=content, reply_to=msg)
