"""The written parts of docs/study.md; what stands in braces is filled in."""

OPENING = """
[arXiv:2509.24317](https://arxiv.org/abs/2509.24317) makes claims about encoders of 86 million weights and more.
`make study` tries these claims with small encoders, and writes this page from its runs
([benchmarks/study](../benchmarks/study)). The page says what can be seen at this scale. It says nothing about the
paper's scale.

Three kinds of training are compared. *V-Pixel*, the paper's stage 1, learns to fill in hidden pixels: it makes the
teacher. *SALT*, stage 2, trains a student to predict the latents of this teacher, which learns no more. The *EMA
baseline* is V-JEPA 2, whose teacher is a moving average of the student's weights.
"""

DATA = {
    "digits": """
- **Digits** (`salt-data synth`): videos of digits that move in one of 8 directions. A single
[token](glossary.md#tubelet) does not show the direction: an encoder has to compare several. The encoder has half a
million weights: width 96, 4 blocks (preset `nano`).
""",
    "strokes": """
- **Strokes**: videos in which a pen draws one of 136 characters of five alphabets, from the timed drawings of
[Omniglot](https://github.com/brendenlake/omniglot). The task is to name the character. Other people drew the test
videos. The encoder is that of digits.
""",
    "real": """
- **Real** (`salt-data pretext`): clips of {num_videos} real videos, and questions that a clip answers itself: is it
played forwards or backwards (arrow), how fast (speed), were its halves swapped (order), which video is it from
(origin). Test clips are from the end of {num_test_videos} of them, which training does not show; many overlap. The
encoder is ViT-Ti at 64 pixels. A clip has four pinned views. The learning rate is another, and was not tuned; the
baseline's momentum is that of digits.
""",
}

SETTINGS = """
All runs of one seed see the same clips in the same order. A student has first weights of its own, not those that its
teacher began with.

- Teacher and student train in batches of 24 clips: {steps}. This is early training: on average, students and baseline
still get better at motion at their last steps; digits and strokes need far longer ([appearance.md](appearance.md) has
longer runs).
- The baseline trains as many steps as teacher and student together.
- There are {videos} training videos of digits. A video of digits or strokes has one
[pinned view](glossary.md#pinned-views).
- Accuracy is that of an attentive [probe](glossary.md#probe) on frozen tokens, trained for {passes} passes over the
data. No checkpoint was picked by its accuracy.
- Training FLOPs are the paper's 6ND: six times weights times tokens, and 2ND for the forwards of a teacher. Those of a
student include its teacher's training and a teacher's forward for each of its own steps, though it read the latents
from a cache. Core minutes are measured: of the run, its teacher, and that cache, the median of the seeds.

Some settings were picked by accuracy on the test videos of digits. The learning rate of `nano` was chosen among four on
V-Pixel teachers, two of them with seeds 0 to 3 and two with seed 0 alone, which no run here has
([appearance.md](appearance.md#the-rate)); no other rate was tried for students. The probe's rate was chosen on one
student; a longer probe would bring trained encoders closer to random weights in digits
([appearance.md](appearance.md#the-probe)). The baseline's momentum is constant, 1 - m/steps: the content of the average
is replaced about m times in a run. V-JEPA 2's 0.99925 over 240,000 steps is m = 180. m was chosen among five on seed
100 alone, and then the rate among the same four. {tuned} Strokes have the settings of digits.

Made on {days} by {commands} commands in {minutes:.0f} core minutes, on {machines}. Of a command that was stopped
and continued, only the last part is counted. What each command found is in [study.jsonl](study.jsonl), and the page and
its figures are made from that file.
"""

CLAIMS = """
Each row compares two encoders: the first one's accuracy minus the second one's, for each seed. The interval is the
95% interval of the mean over seeds (Student's t). A claim *holds* where the whole interval is above 0. It *does not
hold* where all of it is below 0. An interval counts the seeds alone, not which videos are in the test, and about one in
twenty misses the true mean. The rows on a small teacher and on shares of all steps were added when three or four seeds
of them had been seen. What SALT has over the baseline can come from its teacher or from the student's own training: the
row of the teacher alone tells which. {lead}
"""

TABLE = """
Accuracy is the mean over {num_seeds}, with the lowest and the highest of them in brackets, on {num_test} test {clips}.
*Chance* is the accuracy of always naming the class that most training {clips} have.
"""

DOTS = """
Each dot is the accuracy of one seed. A vertical line is the mean of the seeds. The dotted line is chance.
"""

COMPUTE = """
Each dot is a run on digits, the mean of its seeds; the thin line goes from its worst seed to its best. FLOPs are those
of the tables.
"""

SHARING = """
The study's {students} students learned from {teachers} frozen teachers, {shared} of which had two students or more; a
student that is the next teacher of a chain counts as a teacher. A teacher's latents of all clips were computed once
(`salt-serve precompute`) and read by all of its students. The first row is measured. The second counts the same cache
once for each student. The third counts a forward for each clip of each step; its time was not measured. What lies
between the second and the third is saved by the cache, which needs [pinned views](glossary.md#pinned-views). With a
teacher trained for each student, the training of teachers would have taken {training_apart:.1f} core hours instead of
{training:.1f}.
"""

SELECTION = """
Students of three sizes learn from one teacher: that of the table of digits, one of 2 blocks (shallow), one of width 48
(narrow). Four checkpoints of each are compared by two numbers: the loss on clips that no run trained on (`salt-eval
select` measures it), and the accuracy. Both are of the test videos. A straight line is drawn through the points of a
seed. R² says which share of the differences in accuracy the line explains. A later checkpoint has a lower loss and a
higher accuracy on motion both, so the table also has the R² of the step number, which needs no loss. Four unrelated
points have an R² of 0.33 on average, four that rise with training far more. Only students of one teacher can be
compared: those of another seed have other targets, and so losses on another scale.
"""

LARGE = """
Variants of the teacher and the student in the table of digits. Each is compared with its counterpart there, the teacher
or the student of the same seeds. A difference is bold where the interval has no 0 in it. A run's name says what is
different; a student's says whose targets it learned from, or its share of all steps, in eighths. Deep is 8 blocks,
shallow 2. Each trained as many steps as its counterpart, except for the split of a budget and the equal FLOPs; FLOPs
differ with size and masks, and each further stage of a chain adds its own. The student itself has {student} on motion
over {num_seeds}: of a single seed, a difference smaller than this range says nothing.

What the paper says:

- Equal FLOPs: SALT is better than V-JEPA 2 (Figure 7).
- Size: both the ViT-L and the ViT-G student are best with a ViT-L teacher, not with a larger one (Figure 6); small
teachers suffice (section 1).
- Data: teachers of different video data sets are alike, but for one that is worse, and students are better than their
teachers (Figure 4). Here a teacher learns from a quarter of the digits, from strokes, or from both.
- Masks: with multi-block masks, those of all other runs here, teacher and student are best (Figure 5).
- Split: most steps should go to the student; the best teacher has 40,000 of 240,000 steps (Figures 7 and 8).
- Chain: two stages before the student are a little better than one at the same number of steps in all (Table 16). Here
each stage has all the steps of the first.
"""

DECISIONS = """
Each dot is a seed. The black lines are the mean and its 95% interval, which is cut at the edge of the figure.
"""

NOT_RUN = """
The same command goes on after what is in study.jsonl, on this machine or another. `STUDY=large make study` runs everything for which there are data. That takes
a night and more on 2 cores. `STUDY_MINUTES=60 STUDY=large make study` stops after an hour.
"""
