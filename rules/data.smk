if CFG.task.pairs.kind == "generate":

    rule generate_pairs:
        input:
            lexicon=LEXICON,
            templates=TEMPLATES,
        output:
            train=f"{BASE}/pairs/train.jsonl",
            test=f"{BASE}/pairs/test.jsonl",
            provenance=f"{BASE}/pairs/provenance.json",
        log:
            f"{LOGS}/generate_pairs.log",
        benchmark:
            f"{ROWS}/generate_pairs.tsv"
        conda:
            ENVIRONMENT
        params:
            structures=CFG.task.pairs.structures,
            train=CFG.task.pairs.train,
            test=CFG.task.pairs.test,
            seed=CFG.seed,
            code=code("generate_pairs"),
        message:
            "Write agreement pairs from the lexicon"
        script:
            "../workflow_scripts/generate_pairs.py"

elif CFG.task.pairs.kind == "import":

    rule import_pairs:
        input:
            train=CFG.task.pairs.train,
            test=CFG.task.pairs.test,
        output:
            train=f"{BASE}/pairs/train.jsonl",
            test=f"{BASE}/pairs/test.jsonl",
            provenance=f"{BASE}/pairs/provenance.json",
        log:
            f"{LOGS}/import_pairs.log",
        benchmark:
            f"{ROWS}/import_pairs.tsv"
        conda:
            ENVIRONMENT
        params:
            code=code("import_pairs"),
        message:
            "Read the task's pairs"
        script:
            "../workflow_scripts/import_pairs.py"


if CFG.task.pairs.kind == "text":

    rule sample_contexts:
        input:
            model=f"{MODEL}/model/manifest.json",
            corpus=f"{MODEL}/corpus/manifest.json",
        output:
            train=f"{BASE}/tokens/train.parquet",
            test=f"{BASE}/tokens/test.parquet",
            dropped=f"{BASE}/tokens/dropped.parquet",
        log:
            f"{LOGS}/sample_contexts.log",
        benchmark:
            f"{ROWS}/sample_contexts.tsv"
        conda:
            ENVIRONMENT
        params:
            **CFG.task.pairs.model_dump(exclude={"kind"}),
            prepend_bos=CFG.task.prepend_bos,
            code=code("sample_contexts"),
        message:
            "Draw contexts from the corpus's text"
        script:
            "../workflow_scripts/sample_contexts.py"

else:

    rule tokenize_pairs:
        input:
            model=f"{MODEL}/model/manifest.json",
            train=f"{BASE}/pairs/train.jsonl",
            test=f"{BASE}/pairs/test.jsonl",
        output:
            train=f"{BASE}/tokens/train.parquet",
            test=f"{BASE}/tokens/test.parquet",
            dropped=f"{BASE}/tokens/dropped.parquet",
        log:
            f"{LOGS}/tokenize_pairs.log",
        benchmark:
            f"{ROWS}/tokenize_pairs.tsv"
        conda:
            ENVIRONMENT
        params:
            chat_template=CFG.task.chat_template,
            generation_prefix=CFG.task.generation_prefix,
            prepend_bos=CFG.task.prepend_bos,
            length=CFG.task.length.model_dump(),
            position=CFG.task.metric.position,
            code=code("tokenize_pairs"),
        message:
            "Turn pairs into aligned tokens"
        script:
            "../workflow_scripts/tokenize_pairs.py"


rule filter_pairs:
    input:
        model=f"{MODEL}/model/manifest.json",
        train=f"{BASE}/tokens/train.parquet",
        test=f"{BASE}/tokens/test.parquet",
    output:
        train=f"{BASE}/confident/train.parquet",
        test=f"{BASE}/confident/test.parquet",
        prompts=f"{BASE}/confident/prompts.parquet",
    log:
        f"{LOGS}/filter_pairs.log",
    benchmark:
        f"{ROWS}/filter_pairs.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
        gpu=GPU,
    params:
        **CFG.task.confidence.model_dump(),
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("filter_pairs"),
    message:
        "Measure the model on the task and keep what it does with confidence"
    script:
        "../workflow_scripts/filter_pairs.py"


rule tokenize_corpus:
    input:
        model=f"{MODEL}/model/manifest.json",
        pairs=CORPUS_PAIRS,
        files=CORPUS_FILES,
    output:
        manifest=f"{MODEL}/corpus/manifest.json",
    log:
        f"{LOGS}/tokenize_corpus.log",
    benchmark:
        f"{ROWS}/tokenize_corpus.tsv"
    conda:
        ENVIRONMENT
    params:
        sources=[source.model_dump() for source in CFG.corpus.sources],
        block=CFG.corpus.block,
        held_out=CFG.corpus.held_out,
        seed=CFG.corpus.seed,
        code=code("tokenize_corpus"),
    message:
        "Pack text into blocks of tokens"
    script:
        "../workflow_scripts/tokenize_corpus.py"


rule cache_activations:
    input:
        model=f"{MODEL}/model/manifest.json",
        corpus=f"{MODEL}/corpus/manifest.json",
    output:
        manifest=f"{MODEL}/activations/manifest.json",
    log:
        f"{LOGS}/cache_activations.log",
    benchmark:
        f"{ROWS}/cache_activations.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        **CFG.activations.model_dump(),
        sites=SITES,
        model_dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("cache_activations"),
    message:
        "Run the model over the corpus, once, and keep every site's activations"
    script:
        "../workflow_scripts/cache_activations.py"
