"""What other programs call a setting, and what it is here: a hint for whoever types their name.

Each is the key of a setting, or an option of `fedlora simulate`, with its value or its unit where it is not theirs.
"""

TRL = {  # with transformers' TrainingArguments
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantize = 4bit",
    "load_in_8bit": "model.quantize = 8bit",
    "dataset_name": "data.path",
    "dataset_text_field": "data.text",
    "max_length": "model.max_length",
    "max_seq_length": "model.max_length",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.targets",
    "lora_modules_to_save": "model.head",
    "lora_task_type": "model.task",
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "num_train_epochs": "train.epochs, of a round",
    "max_steps": "train.steps, of a round",
    "max_grad_norm": "train.clip",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup, as a share of the run",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "loraplus_lr_ratio": "train.lora_plus",
    "beta": "model.dpo_beta",
    "max_new_tokens": "eval.max_new_tokens",
    "max_completion_length": "eval.max_new_tokens",
    "bf16": "precision = bf16",
    "fp16": "model.dtype = float16",
    "eval_steps": "server.eval_every, in rounds",
    "early_stopping_patience": "server.patience",
    "data_seed": "seed",
    "use_cpu": "model.device = cpu",
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
}
PEFT = {
    "r": "lora.rank",
    "target_modules": "lora.targets",
    "modules_to_save": "model.head",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.kind = dora",
    "init_lora_weights": "lora.init",
    "task_type": "model.task",
}
OPACUS = {
    "noise_multiplier": "dp.noise",
    "target_epsilon": "dp.epsilon",
    "target_delta": "dp.delta",
    "clipping_norm": "dp.clip",
    "max_per_sample_grad_norm": "dp.clip",
}
FLOWER = {
    "num_server_rounds": "rounds",
    "num_supernodes": "clients",
    "fraction_train": "cohort, in clients",
    "fraction_fit": "cohort, in clients",
    "fraction_evaluate": "server.eval_clients, in clients",
    "min_train_nodes": "server.quorum, as a share of the cohort",
    "min_fit_clients": "server.quorum, as a share of the cohort",
    "min_available_nodes": "server.quorum, as a share of the cohort",
    "min_available_clients": "server.quorum, as a share of the cohort",
    "num_sampled_clients": "cohort",
    "local_epochs": "train.epochs",
    "proximal_mu": "train.prox",
    "server_learning_rate": "aggregate.lr",
    "server_momentum": "aggregate.beta1, with aggregate.optimizer = momentum",
    "eta": "aggregate.lr",
    "eta_l": "train.lr",
    "round_timeout": "server.deadline",
    "client_resources_num_cpus": "threads",
    "num_cpus": "threads",
    "quantization": "model.quantize",
}
NVFLARE = {
    "num_rounds": "rounds",
    "num_clients": "clients",
    "n_clients": "clients",
    "min_clients": "server.quorum, as a share of the cohort",
    "wait_time_after_min_received": "server.grace",
    "aggregation_epochs": "train.epochs",
    "local_rounds": "train.epochs",
}
PAPERS = {  # with the scripts that come with them
    "algorithm": "strategy",
    "method": "strategy",
    "aggregation": "strategy",
    "dataset": "data.path",
    "mu": "train.prox",
    "frac": "cohort, in clients",
    "dirichlet_alpha": "data.partition, as dirichlet:0.5",
    "dir_alpha": "data.partition, as dirichlet:0.5",
    "num_local_steps": "train.steps",
    "local_steps": "train.steps",
    "local_bs": "train.batch_size",
    "local_ep": "train.epochs",
}
STRATEGIES = {  # which are settings here, round any strategy
    "fedprox": "train.prox",
    "fedavgm": "aggregate.optimizer = momentum",
    "fedadam": "aggregate.optimizer = adam",
    "fedyogi": "aggregate.optimizer = yogi",
    "fedadagrad": "aggregate.optimizer = adagrad",
    "fedmedian": "aggregate.robust = median",
    "fedtrimmedavg": "aggregate.robust = trimmed_mean",
    "krum": "aggregate.robust = krum",
    "multikrum": "aggregate.robust = multi_krum",
}

HERE = {**PAPERS, **NVFLARE, **FLOWER, **OPACUS, **PEFT, **TRL}


def ours(name: str) -> str:
    """What a name of another program is here; empty for one that is unknown.

    Hyphens are as good as underscores, sections count only where there is no name of the whole, and neither do
    capitals.

    >>> ours("lora_r"), ours("num-server-rounds"), ours("model.lora.peft-lora-r"), ours("lora.rnk")
    ('lora.rank', 'rounds', 'lora.rank', '')
    """
    plain = name.casefold().replace("-", "_").replace(".", "_")
    last = name.casefold().replace("-", "_").rpartition(".")[2]
    return next((HERE[known] for known in (plain, last, last.removeprefix("peft_")) if known in HERE), "")
