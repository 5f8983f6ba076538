"""The commands and their options; `app.COMMANDS` says which function runs each.

Nothing here imports JAX, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from .options import (
    Algorithm,
    Comparison,
    Count,
    Family,
    Flag,
    Float,
    Format,
    Int,
    Mapping,
    Number,
    OwnCount,
    OwnFloat,
    OwnInt,
    OwnSeed,
    RunCount,
    RunInt,
    Seed,
    Share,
    Size,
    Word,
    one,
)

DATA = ("mini_imagenet", "omniglot", "glyphs", "folder")
_NONE = arg(help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Train:
    """Meta-train an algorithm on a family of tasks, test it, and plot how it went.

    Writes a run folder: configuration, metrics (JSON lines and TensorBoard), checkpoint, test
    scores and plots. Settings that are not given are those of the closest recipe; see
    `adaptax recipes list`. Ctrl-C saves, and says how to go on.

    ALGORITHM is maml, fomaml, anil, meta-sgd, maml++, reptile, platipus, bmaml, emaml (an ensemble
    of MAMLs), leo (of embeddings and curves), pretrained (joint training, then fine-tuning),
    cavia (a context of few variables), prototypes and protomaml (of classes), gp (a Gaussian
    process on learned features), class-mean (nearest class means), ridge (regression of each task
    alone), or one of your own, my_module:MyLearner. TASKS is omniglot, mini_imagenet, glyphs (drawn
    from Matplotlib's fonts, no download) or folder (your images, a class a directory); embeddings
    (a file of `adaptax embed`); the functions sinusoid, sinusoid_or_line and finite_sinusoids;
    circles in the plane; celeba (attributes of faces); fsmol (assays); table (a CSV, Parquet or
    Arrow file with numbers to predict; table_classes, chosen by itself, with classes); the
    environments navigation, bandit, tabular_mdp, half_cheetah and ant; or your own,
    my_module:my_tasks. Modules may lie in the current folder.

    For example:
      adaptax train maml sinusoid
      adaptax train reptile omniglot --way 5 --shot 1 --steps 15000
      adaptax train fomaml folder --path my/images --way 3 --shot 2 --steps 500
      adaptax train maml table --path assays.csv --task assay --target activity
      adaptax train platipus sinusoid_or_line --init-from runs/maml-sinusoid_or_line
      adaptax train my_module:MyLearner omniglot --model my_module:make
      adaptax train --resume runs/maml-sinusoid
    """

    algorithm: Algorithm = None
    """what to meta-train"""
    tasks: Family = None
    """what to meta-train on"""
    way: Count = None
    """classes an episode"""
    shot: Int = None
    """support examples a class"""
    query: Int = None
    """query examples a class"""
    steps: Count = None
    """meta-steps"""
    meta_batch: Count = None
    """tasks a meta-step"""
    inner_lr: Float = None
    """step size of the inner loop, for the mean loss"""
    inner_steps: Int = None
    """inner steps in meta-training"""
    eval_steps: Int = None
    """inner steps in validation and test"""
    outer_lr: Float = None
    """step size of the outer loop"""
    first_order: Flag = False
    """drop the second derivatives"""
    seed: OwnSeed = None
    """names all randomness"""
    seeds: Size = 1
    """trainings, of this seed and those after it: the mean and spread of their scores"""
    episodes: Count = None
    """test episodes"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    path: Word = None
    """the images of the task family `folder`, a class a directory; or the file of a table"""
    task: Word = None
    """of a table: the column that names the task of a row"""
    target: tuple[str, ...] = ()
    """of a table: the column to predict, or several"""
    features: tuple[str, ...] = ()
    """of a table: the columns to predict from, by names or patterns; all others if not given"""
    ignore: tuple[str, ...] = ()
    """of a table: columns to leave out"""
    order: Word = None
    """of a table: a column of times; supports are of earlier rows than queries"""
    split: Word = None
    """of a table: a column that says train, val or test of every task"""
    image_size: OwnCount = None
    """side of the images of `folder` in pixels, to which they are scaled (84)"""
    channels: OwnCount = None
    """of the images of `folder`: 1 for grey, 3 for colour"""
    splits: tuple[Number, ...] = ()
    """shares of the classes of `folder` or the tasks of a table, for all splits: 0.6 0.2 0.2"""
    min_images: OwnCount = None
    """leave out classes of `folder` with fewer images"""
    run: Word = None
    """folder to write, else runs/ALGORITHM-TASKS"""
    init_from: Word = None
    """start from what the run in this folder learned: PLATIPUS from MAML"""
    resume: Word = None
    """go on with the run in this folder, with its own settings; --steps extends it"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    validate_every: OwnCount = None
    """meta-steps between validations, else a tenth of all"""
    patience: OwnCount = None
    """stop after so many validations without improvement"""
    model: Word = None
    """a network of your own, `my_module:make`, called with those of out, in_size, key it takes"""
    train_only: Word = None
    """what meta-training trains, by its path in the network, such as `head`; the rest stays"""
    keep: Count = None
    """best checkpoints by validation to keep; of two or more the ensemble is scored too"""
    fast_path: bool = True
    """rewrite convolutions as matrix products where that is faster"""
    mapping: Mapping = "auto"
    """how to map over tasks"""
    set: UseAppendAction[tuple[str, ...]] = ()
    """any setting of the experiment, such as `--set learner.meta_gradient=forward`"""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """a module of your own that the run to resume or to start from may import"""
    format: Format = "png"
    """of figures, beside PNG"""
    coordinator: Word = None
    """of several processes: host:port of the first, or auto where a cluster says it"""
    processes: OwnCount = None
    """how many there are"""
    process_id: OwnInt = None
    """which one this is, from 0"""
    json: Flag = False
    """print the result as JSON"""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score a run on test episodes: those of its own protocol, or others.

    The best meta-parameters by validation are scored. Every run sees the same episodes.

    For example:
      adaptax evaluate runs/maml-omniglot-5w1s
      adaptax evaluate runs/maml-omniglot-5w1s --no-transductive --episodes 1000 --json
    """

    run: Positional[str]
    """folder of the run"""
    episodes: RunCount = None
    """number of episodes"""
    steps: RunInt = None
    """adaptation steps"""
    split: Literal["test", "val"] = "test"
    """whose episodes"""
    transductive: bool = True
    """predict the queries of an episode together, so that batch normalisation mixes them"""
    ensemble: Flag = False
    """score the ensemble of the checkpoints that the run kept"""
    untrained: Flag = False
    """score the network as it was before meta-training, which says what that was worth"""
    data_root: Word = None
    """folder of the data sets, if not the one that the run was trained from"""
    path: Word = None
    """where the images or embeddings are, if not where they were in training"""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """a module of your own that the run names and may import"""
    coordinator: Word = None
    """of several processes: host:port of the first, or auto where a cluster says it"""
    processes: OwnCount = None
    """how many there are"""
    process_id: OwnInt = None
    """which one this is, from 0"""
    json: Flag = False
    """print the scores as JSON"""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train several algorithms, test them on the same episodes, and set the papers' numbers beside.

    Writes comparison.json, comparison.png, a run folder for each algorithm and, for sinusoids,
    the adapted curves. The same command on the same folder goes on where it was interrupted.
    Sinusoids are MAML's: trained with 10 shots for 70,000 meta-steps, tested with 5. Images are
    trained briefly unless --steps says otherwise: 300 meta-steps of glyphs, 2,000 of other data.

    Where uncertainty counts, the table has likelihoods and the coverage of intervals beside the
    errors, and there are pictures of what the models say: ambiguous (noisy sine waves or lines),
    finite_sinusoids, circles, celeba (with the readings that models choose) and fsmol (every
    learner against ridge regression of each assay and a pretrained net). PLATIPUS starts from a
    MAML of its own there, and the times are without it.

    On a table, models of scikit-learn stand beside: the mean, ridge regression, a Gaussian process
    and boosting of each task alone, and boosting of all tasks with each one's mean.

    For example:
      adaptax compare sinusoid
      adaptax compare table --path assays.csv --task assay --target activity
      adaptax compare ambiguous
      adaptax compare glyphs --algorithms maml anil reptile --steps 300
      adaptax compare omniglot --way 5 --shot 1 --steps 10000 --seeds 3
    """

    tasks: Comparison
    """what to compare on; ambiguous is sinusoid_or_line"""
    algorithms: tuple[str, ...] = ()
    """which; by default those that the papers compare"""
    way: OwnCount = None
    """classes an episode (5 if not given)"""
    shot: OwnInt = None
    """support examples a class (1 if not given)"""
    steps: OwnCount = None
    """meta-steps"""
    seeds: Size = 1
    """trainings of each algorithm"""
    episodes: OwnCount = None
    """test episodes (600 if not given; 150 of glyphs, 2,000 sinusoids)"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    path: Word = None
    """the images of the task family `folder`, a class a directory; or the file of a table"""
    task: Word = None
    """of a table: the column that names the task of a row"""
    target: tuple[str, ...] = ()
    """of a table: the column to predict, or several"""
    features: tuple[str, ...] = ()
    """of a table: the columns to predict from, by names or patterns; all others if not given"""
    ignore: tuple[str, ...] = ()
    """of a table: columns to leave out"""
    order: Word = None
    """of a table: a column of times; supports are of earlier rows than queries"""
    split: Word = None
    """of a table: a column that says train, val or test of every task"""
    out: Word = None
    """folder to write, else runs/compare-TASKS"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    format: Format = "png"
    """of figures, beside PNG"""
    json: Flag = False
    """print the comparison as JSON"""


@dataclasses.dataclass(frozen=True)
class Ablate:
    """Train MAML, MAML with each part of MAML++, and MAML++, and test them on the same episodes.

    Writes ablation.json, ablation.png and a run folder for each row: maml-own-rate (that of MAML's
    paper), maml, multi-step-loss, learned-rates, batch-norm, cosine, derivative-order, maml++.
    The single model is scored, and beside it the ensemble of the best 3 checkpoints by
    validation. The same command on the same folder goes on where it was interrupted. The defaults
    take about half an hour on two cores; the paper's length is --steps 125000 --meta-batch 16.

    For example:
      adaptax ablate omniglot
      adaptax ablate omniglot --rows maml maml++ --steps 4000 --meta-batch 8
    """

    tasks: Family
    """what to train on: omniglot, mini_imagenet or glyphs"""
    rows: tuple[str, ...] = ()
    """which; all if not given"""
    way: Size = 20
    """classes an episode"""
    shot: Size = 1
    """support examples a class"""
    steps: Size = 1000
    """meta-steps"""
    meta_batch: Size = 4
    """tasks a meta-step"""
    episodes: Size = 600
    """test episodes"""
    seed: Seed = 0
    """names all randomness"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    out: Word = None
    """folder to write, else runs/ablate-TASKS"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    format: Format = "png"
    """of figures, beside PNG"""
    json: Flag = False
    """print the ablation as JSON"""


@dataclasses.dataclass(frozen=True)
class RecipesList:
    """List the recipes: one for each cell of the papers' tables, and short ones for a CPU.

    For example:
      adaptax recipes list
      adaptax recipes list --json
    """

    json: Flag = False
    """print them as JSON"""


@dataclasses.dataclass(frozen=True)
class RecipesShow:
    """Show the settings of a recipe, and the Python that does the same.

    For example:
      adaptax recipes show maml-omniglot-5w1s
      adaptax recipes show maml-omniglot-5w1s --toml > my.toml
    """

    name: Positional[str]
    """of the recipe"""
    json: Flag = False
    """print the settings alone, as JSON"""
    toml: Flag = False
    """print the recipe as TOML, for `adaptax recipes run FILE.toml` once it is edited"""


@dataclasses.dataclass(frozen=True)
class RecipesRun:
    """Train a recipe and test it as its paper does.

    The result, in the run folder's test.json, says on what hardware and with which versions.

    For example:
      adaptax recipes run maml-omniglot-5w1s-short --data-root my/data
      adaptax recipes run my.toml --set learner.inner_steps=3 --seeds 3
    """

    name: Positional[str]
    """of the recipe, or a TOML file with one of your own"""
    steps: OwnCount = None
    """meta-steps, if not the recipe's"""
    seed: OwnSeed = None
    """names all randomness"""
    seeds: Size = 1
    """trainings, of this seed and those after it: the mean and spread of their scores"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    path: Word = None
    """the images or embeddings of a recipe on the task families `folder` and `embeddings`"""
    run: Word = None
    """folder to write, else runs/NAME"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    set: UseAppendAction[tuple[str, ...]] = ()
    """any setting of the experiment, such as `--set learner.meta_gradient=forward`"""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """a module of your own that the recipe names and may import"""
    format: Format = "png"
    """of figures, beside PNG"""
    coordinator: Word = None
    """of several processes: host:port of the first, or auto where a cluster says it"""
    processes: OwnCount = None
    """how many there are"""
    process_id: OwnInt = None
    """which one this is, from 0"""
    json: Flag = False
    """print the result as JSON"""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train a recipe many times with other settings, and find those that validate best.

    The same command, started on several machines or several times, has as many workers: they share
    the trials by the storage. Optuna proposes the settings (pip install 'adaptax[sweep]') and ends
    trials whose validation is below the median. A trial whose worker died is gone on with. No test
    is looked at. Writes a run folder for each trial, sweep.json, table.csv, sweep.png and
    best.toml, for `adaptax recipes run`.

    For example:
      adaptax sweep maml-sinusoid --over learner.inner_lr=0.001..0.1 --steps 2000
      adaptax sweep my.toml --over learner.inner_steps=1..5 --over 'network.mlp=[40,40]|[80,80]'
    """

    name: Positional[str]
    """of the recipe, or a TOML file with one of your own"""
    over: UseAppendAction[tuple[str, ...]] = ()
    """what to try: section.name=low..high, or section.name=one|another"""
    trials: Size = 20
    """how many, of all workers"""
    seeds: Size = 1
    """trainings of each trial, whose mean counts"""
    steps: OwnCount = None
    """meta-steps, if not the recipe's"""
    set: UseAppendAction[tuple[str, ...]] = ()
    """any setting of the experiment, the same in all trials"""
    validate_every: OwnCount = None
    """meta-steps between validations, else a tenth of all"""
    storage: Word = None
    """URL of a database, such as sqlite:///sweep.db, else the file trials.log in the folder"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    path: Word = None
    """the images or embeddings of a recipe on the task families `folder` and `embeddings`"""
    out: Word = None
    """folder to write, else runs/sweep-NAME"""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """a module of your own that the recipe names and may import"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    format: Format = "png"
    """of figures, beside PNG"""
    json: Flag = False
    """print all trials as JSON"""


@dataclasses.dataclass(frozen=True)
class Runs:
    """List the runs below folders: state, meta-steps, score and experiment; or compare them.

    A run is running while a process works on its folder, done once it is tested, stopped if it can
    go on. The score is that of the test, else the last one of validation.

    For example:
      adaptax runs
      adaptax runs runs/a runs/b --compare
    """

    folders: Positional[tuple[str, ...]] = ()
    """folders to look below; runs if not given"""
    compare: Flag = False
    """print the settings that are not the same in all runs, side by side"""
    json: Flag = False
    """print what is known of each run as JSON"""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Label images, or predict the rows of a table, by a few examples that a run adapts to.

    The support holds a folder of images for each class: as many as the run was trained for, or
    fewer. The images are resized and scaled as in training. Each query is predicted alone unless
    --transductive. Of each it is said which class, how probable, and the entropy of the prediction
    in nats; of ensembles also how much of that is disagreement (epistemic).

    Of a run on a table, support and query are files with the columns of training, any number of
    tasks in each. Of every row of the query the value, its standard deviation and its interval are
    written, or the class and its probability.

    For example:
      adaptax predict runs/maml-table --support new.csv --query ask.csv --out predictions.csv
      adaptax predict runs/maml-omniglot-5w1s --support my/classes --query my/photos
      adaptax predict RUN --support my/classes --query a.png 'more/*.png' --out table.csv
    """

    run: Positional[str]
    """folder of the run"""
    support: str
    """folder of folders of images, one a class; or a file of rows with targets"""
    query: tuple[str, ...]
    """images: files, folders or patterns; or a file of rows"""
    out: Word = None
    """file to write the predictions to: a table.csv, .json or .parquet"""
    steps: RunInt = None
    """adaptation steps"""
    transductive: bool = False
    """predict the queries together, so that batch normalisation mixes them"""
    coverage: Share = 0.9
    """of a table: how probable it is that a target lies in its interval"""
    invert: Flag = False
    """the images are light where those of the run were dark"""
    data_root: Word = None
    """folder of the data sets, if not the one that the run was trained from; none is read"""
    path: Word = None
    """where the images of the run are, if not where they were in training; none is read"""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """a module of your own that the run names and may import"""
    json: Flag = False
    """print the predictions as JSON"""


@dataclasses.dataclass(frozen=True)
class AnalyzeGradients:
    """Which inner gradients to follow: the experiments of section 6 of Reptile's paper.

    Meta-trains Reptile's network on 5-way 5-shot Omniglot, once for each way to make an outer
    update of the gradients g1, g2, … of a task's minibatches. STUDY is combinations: g1, g1+g2,
    (g1+g2)/2, g2 and so on, up to four minibatches; or overlap: Reptile, first-order MAML whose
    last minibatch overlaps earlier ones from the fifth step on, and first-order MAML that keeps
    images for it, by the number of inner steps.

    Writes a run folder for each training, gradient_combinations.json and .png, or overlap.json
    and .png. The same command on the same folder goes on where it was interrupted. The short
    versions, of 2,000 and 1,000 outer iterations, take ten to twenty minutes each. The paper's
    length is --steps 40000: hours.

    For example:
      adaptax analyze gradients
      adaptax analyze gradients --steps 40000 --out runs/combinations
      adaptax analyze gradients --study overlap --inner-steps 2 3 4 5 6
    """

    study: Literal["combinations", "overlap"] = "combinations"
    """which of the two"""
    steps: OwnCount = None
    """outer iterations (2,000 if not given; 1,000 for the overlap)"""
    inner_steps: tuple[Size, ...] = ()
    """of the study of overlap; 2 4 5 6 8 if not given"""
    episodes: Size = 400
    """test episodes"""
    seed: Seed = 0
    """names all randomness"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    out: Word = None
    """folder to write, else runs/analyze-STUDY"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    format: Format = "png"
    """of figures, beside PNG"""
    json: Flag = False
    """print the study as JSON"""


@dataclasses.dataclass(frozen=True)
class AnalyzeTaylor:
    """Measure the two leading terms of meta-gradients: why first order works.

    The expected meta-gradient of each learner is expanded in the inner step size, as in section 5
    of Reptile's paper: a times the gradient of the mean loss, AvgGrad, plus b times AvgGradInner,
    the direction that makes the gradients of a task's minibatches agree. Prints a and b, measured
    and predicted, and the order of what is left, which is 2. Expectations are exact: over all
    orders of k minibatches, in float64.

    TASKS is sinusoid (a tanh network) or omniglot (Reptile's network, softplus for ReLU: where the
    loss has kinks there is no expansion, as --relu shows). Writes taylor.json and taylor.png.

    For example:
      adaptax analyze taylor sinusoid
      adaptax analyze taylor omniglot --learners maml reptile --minibatches 2
    """

    tasks: Positional[Literal["sinusoid", "omniglot"]] = "sinusoid"
    """what the minibatches are of"""
    learners: tuple[str, ...] = ()
    """of sgd (joint training), maml, fomaml and reptile; all if not given"""
    minibatches: tuple[Size, ...] = ()
    """k, of a task; 2 3 4 if not given, or 2 3 for omniglot"""
    rates: tuple[Number, ...] = ()
    """inner step sizes; 8e-4 4e-4 2e-4 1e-4 if not given"""
    count: OwnCount = None
    """tasks to sample (8 if not given; 4 of omniglot)"""
    orderings: OwnCount = None
    """orders of the minibatches to draw for each task, instead of all"""
    relu: Flag = False
    """leave Reptile's network its ReLU"""
    seed: Seed = 0
    """names network, tasks and orders"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    out: Word = None
    """folder to write, else runs/analyze-taylor-TASKS"""
    format: Format = "png"
    """of figures, beside PNG"""
    json: Flag = False
    """print the expansions as JSON"""


@dataclasses.dataclass(frozen=True)
class AnalyzeActive:
    """Active learning: does it help a run to choose which examples it is told the labels of?

    In every test task the run adapts to a few labelled examples, then asks for one more of a pool,
    again and again: the one that its prediction is least sure of, or one at random. Both see the
    same tasks, start and queries. Give runs on the same tasks to compare their gains; a single
    regressor, such as MAML's, is equally unsure everywhere and has none. Writes active.json and
    active.png.

    For example:
      adaptax analyze active runs/bmaml-sinusoid_or_line --start 2 --labels 10
      adaptax analyze active runs/emaml-omniglot-5w1s runs/maml-omniglot-5w1s --pool 10
    """

    runs: Positional[tuple[str, ...]]
    """folders of the runs"""
    start: Size = 1
    """labelled examples to start from, of each class where there are classes"""
    labels: Size = 10
    """examples to label after those"""
    at_once: Size = 1
    """how many of them to label at once; each number of labels is compiled for itself"""
    pool: Size = 20
    """examples in the pool, of each class where there are classes"""
    query: OwnCount = None
    """examples that the scores are of, likewise, if not as many as in the run's own test"""
    strategies: tuple[str, ...] = ("random", "entropy")
    """how to choose: random, entropy, or disagreement of the particles"""
    episodes: Size = 300
    """test tasks"""
    split: Literal["test", "val"] = "test"
    """whose tasks: val to choose settings by"""
    set: UseAppendAction[tuple[str, ...]] = ()
    """any setting of how the runs adapt, such as `--set learner.reduction=balanced`"""
    seed: Seed = 0
    """names the tasks"""
    data_root: Word = None
    """folder of the data sets, if not the one that the runs were trained from"""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """a module of your own that the runs name and may import"""
    out: Word = None
    """folder to write, else runs/active-TASKS"""
    format: Format = "png"
    """of figures, beside PNG"""
    json: Flag = False
    """print the curves as JSON"""


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a classifier of the meta-train classes, whose features `adaptax embed` extracts.

    Classes of validation and test are never seen; the validation accuracy is of images held out of
    the meta-train classes. Writes a run folder: configuration, metrics, checkpoint, the result and
    its curve. Ctrl-C saves, and says how to go on.

    DATA is mini_imagenet, omniglot, glyphs (drawn from Matplotlib's fonts, no download) or folder
    (your images, a class a directory).

    For example:
      adaptax pretrain mini_imagenet --backbone conv4 --size 42 --epochs 20
      adaptax pretrain mini_imagenet --backbone resnet12 --epochs 90 --label-smoothing 0.1
      adaptax pretrain --resume runs/pretrain-conv4-mini_imagenet
    """

    data: Positional[Annotated[str | None, one(str, "DATA", "a data set", DATA), _NONE]] = None
    """what to train on"""
    backbone: Literal["conv4", "resnet12", "wrn28-10"] = "conv4"
    """the network: conv4 suits a CPU, the others an accelerator"""
    size: OwnCount = None
    """side of the images in pixels, to which they are scaled (84; 28 of characters)"""
    width: OwnCount = None
    """filters of conv4 (64) or of the first block of resnet12 (64); widening of wrn28-10 (10)"""
    depth: OwnCount = None
    """layers of wrn28-10 (28)"""
    down: Literal["pool", "stride"] = "pool"
    """how a block of conv4 halves the image; strides are 3 to 4 times as fast"""
    epochs: Size = 60
    """passes over the images"""
    batch: Size = 64
    """images a step"""
    rate: Number = 0.1
    """step size at the start, from where it follows half a cosine to zero"""
    momentum: Number = 0.9
    """of the steps, as Nesterov's"""
    weight_decay: Number = 5e-4
    """of kernels and matrices"""
    label_smoothing: Number = 0.0
    """share of the target that is spread over all classes"""
    augment: bool = True
    """change the images at random: shifts, and mirror images and light but for characters"""
    crop: OwnInt = None
    """shift by so many pixels at most (a tenth of the side; 2 of characters)"""
    jitter: OwnFloat = None
    """change brightness, contrast and saturation by this share at most (0.4; 0 of characters)"""
    held_out: Number = 0.1
    """share of the images of each class that are kept for validation"""
    validate_every: Size = 1
    """epochs between validations"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the convolutions of resnet12 and wrn28-10; auto is bfloat16 on accelerators"""
    seed: Seed = 0
    """names all randomness"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    path: Word = None
    """the images of the data set `folder`, a class a directory"""
    run: Word = None
    """folder to write, else runs/pretrain-BACKBONE-DATA"""
    resume: Word = None
    """go on with the run in this folder, with its own settings"""
    minutes: OwnFloat = None
    """stop in time, with all saved: exit code 75, and the same command goes on"""
    coordinator: Word = None
    """of several processes: host:port of the first, or auto where a cluster says it"""
    processes: OwnCount = None
    """how many there are"""
    process_id: OwnInt = None
    """which one this is, from 0"""
    json: Flag = False
    """print the result as JSON"""


@dataclasses.dataclass(frozen=True)
class Embed:
    """Extract the features of every image of all splits, each divided by its length, to a file.

    The file is for the task family `embeddings`. RUN is the folder of `adaptax pretrain`. Instead
    of a run, --archive reads the embeddings that LEO's authors released
    (storage.googleapis.com/leo-embeddings/embeddings.zip), which are pickles, without running
    anything in them.

    For example:
      adaptax embed runs/pretrain-conv4-mini_imagenet
      adaptax embed --archive embeddings.zip --out leo.safetensors
    """

    run: Positional[Annotated[str | None, one(str, "RUN", "a folder"), _NONE]] = None
    """folder of the run"""
    out: Word = None
    """file to write, else RUN/embeddings.safetensors"""
    batch: Size = 256
    """images at once"""
    layer: OwnInt = None
    """of wrn28-10: the convolution to take features after; LEO's took 21"""
    data_root: Word = None
    """folder of the data sets, if not the one that the run was trained from"""
    archive: Word = None
    """read LEO's released archive instead, or the folder it was unpacked to"""
    view: str = "miniImageNet/center"
    """which embeddings of the archive: also miniImageNet/multiview and tieredImageNet/center"""
    json: Flag = False
    """print what was written as JSON"""
