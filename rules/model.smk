if CFG.model.source.kind == "toy":

    rule prepare_toy:
        input:
            lexicon=LEXICON,
            templates=TEMPLATES,
        output:
            manifest=f"{MODEL}/model/manifest.json",
        log:
            f"{LOGS}/prepare_toy.log",
        benchmark:
            f"{ROWS}/prepare_toy.tsv"
        conda:
            ENVIRONMENT
        resources:
            mem_mb=lambda wildcards, attempt: 6000 * attempt,
            runtime=60,
        params:
            source=CFG.model.source.model_dump(),
            architecture=CFG.model.architecture,
            code=code("prepare_toy"),
        message:
            "Make a small model and train it on the task"
        script:
            "../workflow_scripts/prepare_toy.py"

else:

    rule prepare_model:
        input:
            files=MODEL_FILES,
        output:
            manifest=f"{MODEL}/model/manifest.json",
        log:
            f"{LOGS}/prepare_model.log",
        benchmark:
            f"{ROWS}/prepare_model.tsv"
        conda:
            ENVIRONMENT
        resources:
            mem_mb=lambda wildcards, attempt: 6000 * attempt,
            runtime=60,
        params:
            source=CFG.model.source.model_dump(),
            architecture=CFG.model.architecture,
            code=code("prepare_model"),
        message:
            "Make the model ready"
        script:
            "../workflow_scripts/prepare_model.py"
