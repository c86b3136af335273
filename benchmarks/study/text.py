"""The written parts of docs/study.md; what stands in braces is filled in."""

OPENING = """
[arXiv:2509.24317](https://arxiv.org/abs/2509.24317) makes claims about encoders of 86 million weights and more.
`make study` tries these claims with encoders of half a million weights (preset `nano`), and writes this page from
its runs ([benchmarks/study](../benchmarks/study)). The page says whether a claim holds at this scale. It says
nothing about the paper's scale.

There are three data sets:

- **Digits** (`salt-data synth`): videos of digits that move in one of 8 directions. A single
[token](glossary.md#tubelet) does not show the direction: an encoder has to compare several.
- **Strokes**: videos in which a pen draws one of 136 characters of five alphabets. The task is to name the
character. Other people drew the test videos.
- **Real** (`salt-data pretext`): clips of real videos, and questions that a clip answers itself: which way time runs
(arrow), how fast it plays (speed), whether its halves were exchanged (order), which video it is from (origin). The encoder is ViT-Ti at 64 pixels. Test
clips are from the end of each video, which training does not show.

A seed decides the first weights, the masks and the order of the clips. All runs of one seed see the same clips. The
first table of digits has {seeds} of them, all else {large_seeds}.

- Teacher and student train {digits} steps of 24 clips on digits, {strokes} on strokes, {real} on real videos. That is
long enough for motion; digits need far longer, and [appearance.md](appearance.md) has longer runs.
- The EMA baseline is V-JEPA 2: its teacher is a moving average of the student's weights. It trains as many steps as
teacher and student together. The momentum of the average is 1 - m/steps. {tuned} SALT's settings are those of the
preset and were not tuned on any of these runs.
- There are {videos} training videos of digits. A video of digits or strokes has one
[pinned view](glossary.md#pinned-views), a real clip four.
- Accuracy is that of an attentive [probe](glossary.md#probe) on frozen tokens, trained for {passes} passes over the
data. But for the momentum, no checkpoint or setting was picked by its accuracy.

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

COMPUTE = """
Each dot is a run on digits, the mean of its seeds; the thin line goes from its worst seed to its best. FLOPs are the
paper's 6ND; those of a student include its teacher's.
"""

SHARING = """
The study's {students} students learned from {teachers} frozen teachers. A teacher's latents of all clips were computed
once (`salt-serve precompute`) and read by all of its students. The first row is measured; the others count what the
same students would have asked for, at the measured hours for a clip. With a teacher trained for each student, the
training of teachers would have taken {training_apart:.1f} core hours in place of {training:.1f}.
"""

SELECTION = """
Students of three sizes learn from one teacher. Four checkpoints of each are compared by two numbers: the loss on clips
that no run trained on (`salt-eval select` measures it), and the accuracy on motion. A straight line is drawn through
the points of a seed. R² says which share of the differences in accuracy the line explains.
"""

LARGE = """
Runs on digits around the teacher and the student of the first table (blue: teachers, orange: students, green: the
baseline). A run's name says what is different; a student's
says whose targets it learned from, or how many eighths of the steps it got.
"""

NOT_RUN = """
`STUDY=large make study` runs these too. That takes a night and more on 2 cores, or a GPU. `STUDY_MINUTES=9` ends it after 9
minutes; the same command then goes on from there.
"""
