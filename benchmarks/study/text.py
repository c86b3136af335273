"""The written parts of docs/study.md; what stands in braces is filled in."""

OPENING = """
[arXiv:2509.24317](https://arxiv.org/abs/2509.24317) makes claims about encoders of 86 million weights and more.
`make study` tries these claims with encoders of half a million weights (preset `nano`), and writes this page from
its runs ([benchmarks/study](../benchmarks/study)). The page says whether a claim holds at this scale. It says
nothing about the paper's scale.

There are two data sets:

- **Digits** (`salt-data synth`): videos of digits that move in one of 8 directions. A single
[token](glossary.md#tubelet) does not show the direction: an encoder has to compare several.
- **Strokes**: videos in which a pen draws one of 136 characters of five alphabets. The task is to name the
character. Other people drew the test videos.

Each run was made with {seeds} seeds. A seed decides the first weights, the masks and the order of the clips. All runs
of one seed see the same clips.

- Teacher and student train {digits} steps of 24 clips on digits, and {strokes} on strokes.
- The EMA baseline is V-JEPA 2: its teacher is a moving average of the student's weights. It trains as many steps as
teacher and student together. The momentum of the average is 1 - {memories}/steps, so that the average reaches back
over the same part of a run as with V-JEPA 2's 0.99925 in 240,000 steps.
- There are {videos} training videos of digits, each with one [pinned view](glossary.md#pinned-views).
- Accuracy is that of an attentive [probe](glossary.md#probe) on frozen tokens, trained for {passes} passes over the
data. No checkpoint or setting was picked by its accuracy.

Made on {day} by {commands} commands in {minutes:.0f} minutes of one core, on {machine}.
"""

CLAIMS = """
Each row compares two encoders: the first one's accuracy minus the second one's, for each seed. The interval is the
95% interval of the mean over seeds. A claim *holds* where the whole interval is above 0. It *does not hold* where all
of it is below 0. Where a teacher is no better than random weights, the claims about its students say little.
"""

TABLE = """
Accuracy is the mean over seeds, with the least and the most of them in brackets, on {num_test} test videos. *Chance* is
the accuracy of always naming the largest class. Training FLOPs include those of the run's teacher.
"""

DOTS = """
Each dot is the accuracy of one seed. A vertical line is the mean of the seeds. The dotted line is chance.
"""

SELECTION = """
Students of three sizes learn from one teacher. Four checkpoints of each are compared by two numbers: the loss on clips
that no run trained on (`salt-eval select` measures it), and the accuracy on motion. A straight line is drawn through
the points of a seed. R² says which share of the differences in accuracy the line explains.
"""

LARGE = """
Moving digits, {done} of {seeds} seeds. The teacher and the student are those of the first table.
"""

NOT_RUN = """
`STUDY=large make study` runs these too. That takes a night on 2 cores, or a GPU. `STUDY_MINUTES=9` ends it after 9
minutes; the same command then goes on from there.
"""
