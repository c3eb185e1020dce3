HEAD


@dataclass(frozen=True, slots=True)
class FixedPlan:
    """A `BatchPlan` of chosen batches: step s takes batch s - 1."""

    batches: list[np.ndarray]
    corpus: Corpus

    @property
    def steps_per_epoch(self) -> int:
        """Batches in all."""
        return len(self.batches)

    def epoch_of(self, step: int) -> int:
        """Always the first."""
        return 0 * step

    def batch(self, step: int) -> np.ndarray:
        """(B,) rows."""
        return self.batches[step - 1]

    def positives(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """(B,) text ids; MEDI's rows have one positive each."""
        return self.corpus.positive[self.corpus.positive_offsets[rows] + epoch]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share."""

    student: Path
    corpus: Corpus
    tokens: TokenTable
    plan: FixedPlan
    precision: str
    device: torch.device
    guide: GuideLookup | None = None
    peer_guide: SentenceTransformer | None = None
    learning_rate: float = LEARNING_RATE
    dropout: float | None = None
    """None as the models say; 0.0 for the proof of equality."""


@dataclass(slots=True)
class Seen:
    """What one side read and got, batch for batch. Recording is off in timed runs."""

    texts: list[BatchOfTexts]
    losses: list[float]


def make_model(folder: Path, shape: Shape, seed: int) -> Path:
    """A sentence-transformers folder: BERT of this shape with random weights, CLS pooling and normalisation."""
    layers, hidden, heads, intermediate = shape
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = MAX_LENGTH
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_LENGTH,
        # Twice BERT's: with 0.02 all texts are alike to random weights, and rounding decides what the guide masks.
        initializer_range=0.04,
    )
    plain = folder.with_name(folder.name + "-plain")
    BertModel(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    modules = [Transformer(str(plain), max_seq_length=MAX_LENGTH), Pooling(hidden, "cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


def _bench(folder: Path, source: Path, student: Path, options: argparse.Namespace, console: Console) -> Bench:
    """Corpus, tokens and the first whole one-task batches of gist-train's own plan."""
    settings = {
        "name": "benchmark",
        "output_dir": str(folder),
        "model": {"name": str(student)},
        "data": {"train": [{"source": "medi", "path": str(source)}], "batching": "task"},
        "training": {"batch_size": BATCH_SIZE},
    }
    config = Config.model_validate(settings)
    corpus = prepare_corpus(config, console)
    tokens = prepare_tokens(corpus, load_student(config.model), console)
    plan = batch_plan(config, corpus)
    chosen: list[np.ndarray] = []
    for step in range(1, plan.steps_per_epoch + 1):
        rows = plan.batch(step)
        batch = corpus.batch(rows, plan.positives(rows, 0))
        texts = np.concatenate([batch.anchor, batch.positive, batch.negative])
        # A text that stands twice in a batch ties with itself in the guide's eyes, and rounding would break the tie.
        if len(set(corpus.task[rows].tolist())) == 1 and len(texts) == len(np.unique(texts)) == 3 * BATCH_SIZE:
            chosen.append(rows)
        if len(chosen) == options.batches:
            break
    return Bench(student, corpus, tokens, FixedPlan(chosen, corpus), options.precision, torch.device(options.device))


def _fill_guide(folder: Path, guide: Path, corpus: Corpus, ids: np.ndarray, device: torch.device) -> tuple[GuideLookup, float]:
    """The guide's embeddings of the texts `ids`, and the seconds that its pass took."""
    config = GuideConfig(name=str(guide), dtype="float32")
    model = load_guide(config)
    model.encoder.to(device)
    store = GuideStore(folder)
    began = time.perf_counter()
    for _ in store.fill(model, config, corpus.hashes[ids], corpus.text_lengths()[ids], lambda i: corpus.text(int(ids[i]))):
        pass
    seconds = time.perf_counter() - began
    return GuideLookup(store, store.positions(corpus.hashes)), seconds


def run_ours(bench: Bench, count: int, seen: Seen | None = None) -> tuple[float, list[tuple[tuple[int, int], ...]]]:
    """Trains `count` steps with gist-train; seconds, and (texts, tokens each) of every step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the trainer of the other side leaves its own behind
    accelerator, _ = make_accelerator(bench.precision, None)
    student = load_student(ModelConfig(name=str(bench.student), dropout=bench.dropout))
    weights = [p for p in student.encoder.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=bench.learning_rate, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(nn.Sequential(student.encoder), adamw)
    if seen is not None:
        model.register_forward_pre_hook(lambda _, args: seen.texts.append(_texts_of_pack(args[0])))
    guided = bench.guide is not None
    loss = LossConfig(
        temperature=TEMPERATURE, contrast_anchors=guided, contrast_positives=guided, mask_duplicates=False
    )  # as the other side's losses
    schedule = Schedule("constant", bench.learning_rate, count, 0)
    training = Training(
        accelerator,
        model,
        optimizer,
        schedule,
        bench.plan,
        bench.corpus,
        bench.tokens,
        bench.guide,
        loss,
        GRAD_CLIP,
        0,  # type: ignore[arg-type]
    )
    _synchronise(bench.device)
    began = time.perf_counter()
    records = list(steps(training, 0, count))
    _synchronise(bench.device)
    seconds = time.perf_counter() - began
    if seen is not None:
        seen.losses.extend(record.loss for record in records)
    accelerator.free_memory()
    return seconds, [record.groups for record in records]


class _InOrder(DefaultBatchSampler):
    """A data set's rows as they stand."""

    def __init__(self, dataset: Dataset, **options: Any):
        super().__init__(SequentialSampler(dataset), **options)


class _Clock(TrainerCallback):
    """From the beginning of the epoch (models, data sets and loaders are there) to the end of the last step."""

    def __init__(self, device: torch.device):
        self.device, self.began, self.seconds = device, 0.0, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        _synchronise(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """Reads the clock after the last step."""
        if state.global_step == state.max_steps:
            _synchronise(self.device)
            self.seconds = time.perf_counter() - self.began


def run_theirs(bench: Bench, count: int, seen: Seen | None = None) -> float:
    """Trains `count` steps with SentenceTransformerTrainer; seconds."""
    model = SentenceTransformer(str(bench.student), device=str(bench.device))
    if bench.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = bench.dropout
    loss: nn.Module
    if bench.peer_guide is None:
        loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    else:
        loss = GISTEmbedLoss(model, bench.peer_guide, temperature=TEMPERATURE)
    if seen is not None:
        loss.register_forward_pre_hook(lambda _, args: seen.texts.append(_texts_of_features(args[0])))
        loss.register_forward_hook(lambda _, __, out: seen.losses.append(out.item()))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=count,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=bench.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=GRAD_CLIP,
            bf16=bench.precision == "bf16",
            use_cpu=bench.device.type == "cpu",
            batch_sampler=_InOrder,  # type: ignore[arg-type]
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.ROUND_ROBIN,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = _Clock(bench.device)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=_data_sets(bench), loss=loss, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.accelerator.free_memory()
    return clock.seconds


def _data_sets(bench: Bench) -> DatasetDict:
    """One data set for each batch, which has one task: taken in turn they give the batches in their order."""
    sets = {}
    for number, rows in enumerate(bench.plan.batches):
        batch = bench.corpus.batch(rows, bench.plan.positives(rows, 0))
        columns = {
            name: [bench.corpus.text(int(i)) for i in ids]
            for name, ids in (("anchor", batch.anchor), ("positive", batch.positive), ("negative", batch.negative))
        }
        sets[f"{number}-{bench.corpus.tasks[bench.corpus.task[rows[0]]]}"] = Dataset.from_dict(columns)
    return DatasetDict(sets)


def _texts_of_pack(pack: Pack) -> BatchOfTexts:
    flat, bounds = pack.input_ids[0].tolist(), pack.lengths.cumulative.tolist()
    return [flat[bounds[i] : bounds[i + 1]] for i in pack.restore.tolist()]


def _texts_of_features(features: Sequence[dict[str, torch.Tensor]]) -> BatchOfTexts:
    pairs = [pair for column in features for pair in zip(column["input_ids"], column["attention_mask"], strict=True)]
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def compare(bench: Bench) -> dict[str, Any]:
    """Whether both sides read the same texts in the same rows and get the same losses: float32, dropout off, weights untouched."""
    still = replace(bench, dropout=0.0, learning_rate=0.0, precision="float32")
    ours, theirs = Seen([], []), Seen([], [])
    count = len(bench.plan.batches)
    run_ours(still, count, ours)
    run_theirs(still, count, theirs)
    same_rows = ours.texts == theirs.texts and len(ours.texts) == count
    apart = max((abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)), default=float("inf"))
    return {
        "equal": same_rows and apart <= TOLERANCE,
        "same_rows": same_rows,
        "largest_loss_difference": apart,
        "losses_ours": ours.losses,
        "losses_theirs": theirs.losses,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
