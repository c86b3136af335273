"""The written parts of docs/fidelity.md."""

LEAD = """
This page compares this code with its sources. Each row has a number that the SALT paper or a reference implementation
gives, and the number that this code gives for the same thing. `salt-eval fidelity` computes all of ours again and
writes this page. `tests/test_fidelity.py` does the same, and fails where a verdict changes or the page is out of date.

The sources:

- The paper is [arXiv:2509.24317](https://arxiv.org/abs/2509.24317).
- "V-JEPA 2's code" is facebookresearch/vjepa2 at commit c2963a4, "VideoMAE's code" is MCG-NJU/VideoMAE at 14ef8d8. Both
  were read, and run on a CPU where a number had to be measured.
- "By hand" is a calculation from the facts that stand beside it.

The verdicts: *equal* says that both are the same. *Rounded* or *cut* says that ours has more digits, and that rounding
them, or leaving them out, gives the source's number. *Within* says how far apart the two may be, and that they are no
further apart. The words of training (token, mask group, context and target) are in the [glossary](glossary.md).
"""

MODELS = """
The paper gives ViT-G 1.843 billion weights. That needs an MLP of width 8192, and our preset has it. V-JEPA 2's code
builds an MLP of 4 x 1664 = 6656, because it passes the ratio under a misspelt name. Predictors are counted with two
mask tokens, one for each mask set.
"""

ROPE = """
Rotary positions turn pairs of channels by an angle that depends on the token's place. There are two ways to form the
pairs. The usual one is `interleaved`: both channels of a pair turn at one speed. V-JEPA 2's own is `vjepa2_tiled`, our
default: the two channels of a pair turn at different speeds.
"""

INITIAL = """
The losses that a run starts from, before it has learned anything. Its predictions then have a standard deviation of
0.39. Against targets of a standard normal distribution the L1 loss is 0.798 x (1 + 0.39^2)^(1/2) = 0.857, and the
squared error to pixels is 1 + 0.39^2 = 1.15.
"""

CROPS = """
The crop has the area and aspect ratio of the paper's Table 5. A box that does not fit into the frame is drawn again, up
to ten times. If none of the ten fits, the crop is the largest centred box that does. The last rows give the reference's
function our random draws: it returned our box for all of 20,000, of which four for each frame are shown (top x left x
height x width, in frames of 240 lines). The other rows are means over 20,000 draws, with a standard error of 0.1 % for
the shares on either side.
"""

MASKS = """
A mask hides blocks of tokens. The size of a block follows from V-JEPA 2's seed, so sizes are compared exactly. Where a
block lies is drawn by another generator here, so only means can be compared: over 150 batches with the block sizes of
seeds 0 to 149, here and in the reference. Such a mean has a standard error of 0.002 to 0.004. The tolerance is
therefore 0.01 of the tokens, or 3 of the 196 tokens of a time step.
"""

TRUNCATION = """
These tables show what `truncate: first` does to the last time steps of a clip.

The clips of a [mask group](glossary.md#mask-group) keep equally many tokens: as many as the clip with the fewest.
V-JEPA 2 orders the tokens by time and keeps the *first* ones. Tokens that are cut off are neither seen nor predicted.
Before the cut all time steps have the same share of [context and target](glossary.md#context-and-target). After it the
last ones are nearly empty. In a group of 24 clips the long-range mask keeps 38 of 196 context tokens in the first time
step and 2 in the last. Most of its context is in the first two or three time steps, and targets become few in the last
two.

Two things follow. A part of the task is to extrapolate in time. And the group's size decides the share of tokens that
is seen: 15 % in a group of 24, 28 % without a cut. The papers speak of "90 % masking"; only the cut brings the masks
near that. A larger group, or a cut at random (`truncate: random`), is another task. So the group has 24 clips here on
every machine, as many as the paper has on each GPU (3072 / 128).
"""

TRAINING = """
The schedules of the paper's Table 5 depend on the step alone. The first update is step 1.
"""

PROBES = """
The probes of `salt-eval probe --preset`, on a frozen encoder. In the first row our code and the reference drew from the
same seeds: all 40 images were equal, bit for bit. The fast forms of the probe use V-JEPA's optimizer, as the paper's
Table 7 says ("identical to V-JEPA"): gradients are clipped to a norm of 1, and biases and norms have no weight decay.
"""

COMPUTE = """
Two ways to count the compute of a run. `salt-eval flops --paper` prints the tables of the next section. `salt-eval
flops --preset vit-g --teacher vit-l --teacher-steps 80000` prints a row of the table below, which has both counts.

The paper's rule, 6ND, takes 6 FLOPs for each weight and token. For each mask set it gives the encoder a tenth of the
tokens and the predictor all of them. It leaves attention out.

The exact count has every matrix product, attention included, at the tokens that the masks really keep. Those are more
for the encoder (15 % in a mask group of 24, not 10) and fewer for the predictor. It equals what torch counts in a real
step of each objective (`tests/test_flops.py`).
"""

CHOICES = """
Some things the sources do not say, or say differently. This is what is done here:

- **Decoder of stage 1.** No table describes it. The paper's FLOPs are only reached with both mask sets of each clip and
  a decoder of 22 M weights. So it is the predictor of Table 4, with an output of 1,536 values instead of the teacher's
  width.
- **Pixel targets.** They are "identical to VideoMAE" (section 2.2). So each cube and colour channel is normalised by
  its own mean and unbiased standard deviation. MAE's normalisation over all channels together is the option
  `pixel_norm: joint`; V-JEPA's own ablation of pixel targets names it. It is computed on ImageNet-normalised pixels, as
  in MAE's loader, so channels weigh 1/0.229, 1/0.224 and 1/0.225. VideoMAE undoes that normalisation first, which makes
  no difference for `channel`.
- **Teacher's features.** They are taken after the encoder's final norm and then pass a LayerNorm without weights.
  V-JEPA 2's code does so; the paper's equation 1 does not show it.
- **Which weights are the teacher.** Those that were trained. V-Pixel has no moving average.
- **Schedules.** Each stage begins its schedules anew, warm-up included (10,000 steps, which is half of a teacher of
  20,000 steps). They reach their end at the last step (Table 5: scale 1). V-JEPA stops at 80 % of them.
- **Gradient clipping** to a norm of 0.02. Encoder and predictor are clipped separately, and only after the warm-up. The
  paper does not say how. V-JEPA's code does it so, and Table 5 repeats V-JEPA's rates, weight decay, crop and masks.
  V-JEPA 2 does not clip. The other way is `optim.clip: joint` with `optim.clip_after_warmup: false`: both together,
  from the first step. Then the mask tokens, which start at zero, have 99.6 % of the norm at the start, and decide how
  much all other gradients are cut. V-JEPA counts in epochs and begins to clip one epoch after its warm-up.
- **Mask tokens.** One for each mask set. They start at zero and have weight decay, as in V-JEPA. V-JEPA 2 has several
  and trains one.
- **Random resized crop.** It is torchvision's and V-JEPA's. The ten tries are drawn before the size of the frame is
  known, so that one draw fits every video. Until view version 2 a box that did not fit was made smaller: then 61 % of
  the crops of a 16:9 video filled its height, where the reference has 2.4 %.
- **Frames of a clip.** They are 4 apart (0, 4, 8 ... 60), as the paper says. V-JEPA's loader spreads them over the
  whole window, its last frame included (0, 4, 8, 12, 17 ... 63). In a short video it begins to repeat the last frame
  one earlier, and it never draws the last start that is possible. `view.sampling: window` does the same, for every
  start in videos of 1 to 399 frames.
- **RoPE.** It is V-JEPA 2's tiled one ("identical to V-JEPA 2", section 3). Angles are float32 here. In the reference
  autocast makes them bfloat16: then they are up to 0.012 rad wrong with 16 rows of tokens, and 0.031 with 24. A turned
  query is then 0.37 % off, instead of 0.22 %, which is the rounding of the result. After 12 blocks the tokens are
  0.7135 % off instead of 0.7132 %, and differ by 0.16 % from each other. The predictor's positions are those of the
  clip at hand, not of the resolution that it was built for.
- **Heads.** The predictor has the 16 of Table 4; the reference's configurations have 12. ViT-g and ViT-G have the 16 of
  Table 3; the released ViT-g has 22.
- **Masks.** Every clip of the global batch has its own. In the reference all ranks start with one seed, so they tend to
  draw the same positions.
- **Probes.** These follow the reference: RandAugment, erasing, the image probe's flip, AutoAugment and antialias, the
  first weights of a deep probe, and the learning rate of each update. These differ, and each probe's protocol names
  them: erased noise is rounded and clamped to 8-bit pixels, because clips stay uint8 until they are normalised;
  segments are scored at their middles; precision on a GPU is bfloat16 (float16 in the reference). V-JEPA's weight decay
  falls to 1e-6, a default of its code that no configuration changes. The fast forms do the same.
- **Surprise of a model that predicts pixels** (VideoMAEv2 in Table 9). It is the mean absolute error of pixels that are
  normalised within each cube, predicted from the context alone. The code of the physics repository sets VideoMAE's
  predictions to zero, so its published surprise is the size of the target. The paper does not say what it did. Ours is
  compared with `transformers`' own decoder and loss (`tests/test_eval_physics.py`).
- **Loss.** It is the mean over the tokens and channels of a clip, then over the good clips of the global batch, then
  over the mask sets. The reference takes the mean on each rank. The two are equal where all ranks have equally many
  clips.
"""
