"""The written parts of docs/fidelity.md."""

LEAD = """
Every number that the SALT paper and the reference code give about the method, and the number that this code gives.
Written by `salt-eval fidelity`, which computes everything again; `tests/test_fidelity.py` computes it too, and fails
where a verdict changes or where this page is no longer what the command writes.

Sources: the paper is [arXiv:2509.24317](https://arxiv.org/abs/2509.24317); V-JEPA 2's code is facebookresearch/vjepa2
at c2963a4 and VideoMAE's is MCG-NJU/VideoMAE at 14ef8d8, read, and run on a CPU where a number had to be measured;
"by hand" is arithmetic from the facts beside it. Verdicts: *equal*; *rounded* or *cut*: ours has the printed digits
when its further ones are rounded or cut off; *within*: at most so far off.
"""

MODELS = """
V-JEPA 2's code builds ViT-G with an MLP of 4 x 1664: it passes the ratio under a misspelt name. The paper's 1.843 B
needs 8192, which is what the preset has. Predictors are counted with two mask tokens, one for each mask set.
"""

ROPE = """
Two ways to pair channels and frequencies: V-JEPA 2's own (`vjepa2_tiled`, the default), in which the two channels of
a pair turn at different speeds, and the usual one (`interleaved`).
"""

INITIAL = """
The losses that a run starts from: with predictions of deviation 0.39 that know nothing yet, L1 to normal targets is
0.798 x (1 + 0.39^2)^(1/2) = 0.857, and the squared error to pixels 1 + 0.39^2 = 1.15.
"""

CROPS = """
Table 5's scale and ratio in frames of 240 lines. A box that does not fit is drawn again, up to ten times; the largest
centred one is what remains after that. The reference's function, given our draws, returns our boxes (20,000 of 20,000;
four of each shape stand here as top x left x height x width). Shares are over 20,000 draws, with a standard error of
0.1 % on either side.
"""

MASKS = """
Block sizes are a function of V-JEPA 2's seeds, so they are compared exactly. Where blocks lie comes from another
generator here, so shares are compared as means over 150 batches with the block sizes of seeds 0 to 149, as in the
reference; the mean of 150 batches has a standard error of 0.002 to 0.004 in either, hence a tolerance of 0.01 of the
tokens, and of 3 of the 196 tokens of a time step.
"""

TRUNCATION = """
What `truncate: first` does to the last time steps. The clips of a mask group keep equally many tokens, the count of
the group's smallest member, and V-JEPA 2 keeps the *first* ones in time order. Blocks cover all time steps alike, so
before the cut every time step has the same share of context and target; after it the last ones are nearly empty. In a
group of 24 the long range keeps 38 of 196 context tokens in the first time step and 2 in the last, and its context is
mostly the first two or three time steps; targets thin out in the last two. Dropped tokens are neither seen nor
predicted. So a part of the task is to extrapolate in time, and the share that is seen, 15 % of the tokens instead of
28 %, is a consequence of the group's size: the "90 % masking" of the papers is approached only because of the cut. A
group that is larger, or cut at random (`truncate: random`), trains another task; that is why the group's size is
fixed at the paper's 24 clips a GPU (3072 / 128) whatever the machine.
"""

TRAINING = """
Table 5's schedules are pure functions of the step; the first update is step 1.
"""

PROBES = """
The frozen-backbone probes of `salt-eval probe --preset`. Where ours and the reference drew from equal seeds, all 40
images of the first row were equal to the last bit. The fast forms have V-JEPA's optimizer, as the paper's Table 7 says
("identical to V-JEPA"): gradients clipped to a norm of 1, no decay of biases and norms.
"""

COMPUTE = """
`salt-eval flops --paper` prints the tables of the next section, `salt-eval flops --preset vit-g --teacher vit-l
--teacher-steps 80000` a row of the one below: the paper's rule beside the exact count. The rule (6ND) gives the
encoder a tenth of the tokens for each mask set and the predictor all of them, and leaves attention out. The exact
count has every matrix product, attention included, at the tokens that the masks keep: more for the encoder (a mask
group of 24 keeps 15 %, not 10), fewer for the predictor. It equals what torch counts in a real step of each objective
(`tests/test_flops.py`).
"""

CHOICES = """
Where the sources are silent or disagree, and what is done here:

- **Stage 1's decoder** is in no table. The paper's FLOPs are only reached with both mask sets of each clip and 22 M
  weights, so it is Table 4's predictor with a head of 1,536 values in place of the teacher's width.
- **Pixel targets**: "identical to VideoMAE" (section 2.2), so each cube and channel is normalised by its own mean and
  unbiased deviation; MAE's normalisation over all channels is `pixel_norm: joint`, which V-JEPA's own pixel ablation
  names. It is of ImageNet-normalised pixels, as MAE's loader hands them to its loss: channels weigh by 1/0.229, 1/0.224
  and 1/0.225, and grey is not grey. VideoMAE undoes that first, which `channel` would not notice.
- **Teacher's features**: after the encoder's final norm, then a LayerNorm without weights. Equation 1 has none,
  V-JEPA 2's code does.
- **Which weights are the teacher**: those that were trained; V-Pixel has no moving average.
- **Schedules** start anew in each stage, warm-up included (10,000 steps, half of a 20k teacher's), and reach their
  end at the last step (Table 5: scale 1; V-JEPA stops at 80 %).
- **Gradient clipping** at 0.02: of encoder and predictor apart, and only after the warm-up. The paper does not say; it
  is what V-JEPA's code does, whose rates, decay, crop and masks Table 5 repeats (V-JEPA 2 clips nothing). Over both
  together from the first step (`optim.clip: joint`, `optim.clip_after_warmup: false`) the zero mask tokens take 99.6 % of
  the norm at the start, and so decide how far all else is cut. V-JEPA counts in epochs and begins one epoch after its
  warm-up.
- **Mask tokens**: one for each mask set, zero at first and with weight decay (V-JEPA). V-JEPA 2 holds several and
  trains one.
- **Random resized crop**: torchvision's and V-JEPA's, from ten tries that are drawn before the frame's size is known,
  so that one draw fits every video. Until view version 2 a box that did not fit was shrunk: 61 % of the crops of a
  16:9 video filled its height, where the reference has 2.4 %.
- **Frames of a clip** are a step of 4 apart (0, 4, 8 ... 60), as the paper says. V-JEPA's loader spreads them over the
  window, its end included (0, 4, 8, 12, 17 ... 63), repeats the last frame one earlier in a short video, and never
  draws the last possible start: `view.sampling: window`, equal to it for every start of videos of 1 to 399 frames.
- **RoPE** is V-JEPA 2's tiled one ("identical to V-JEPA 2", section 3); its angles are float32 here, bfloat16 there
  under autocast, where they are up to 0.012 rad off on 16 rows and 0.031 on 24: turned queries are 0.37 % off instead
  of 0.22, which is the rounding of the result, and the tokens of 12 blocks 0.7135 % instead of 0.7132, 0.16 % from
  each other. The predictor's positions are those of the clip at hand, not of the resolution that it was built
  for.
- **Heads**: the predictor has Table 4's 16 (the code's configurations: 12), ViT-g and ViT-G have Table 3's 16 (the
  released ViT-g: 22).
- **Masks**: every clip of the global batch has its own. In the reference all ranks begin with one seed, so that they
  tend to draw the same positions.
- **Probes**: RandAugment, erasing, the image probe's flip, AutoAugment and antialias, the first weights of a deep probe
  and the learning rate of each update are the reference's. Left different, and named in each probe's protocol: erased
  noise is rounded and clamped to 8-bit pixels, since clips stay uint8 until they are normalised; segments are scored at
  their middles; precision is bfloat16 on a GPU (float16 there). V-JEPA's weight decay falls to 1e-6, the default of its
  code that no configuration sets: the fast forms do the same.
- **Surprise of a pixel predictor** (Table 9's VideoMAEv2): the mean absolute error of pixels normalised within each
  cube, predicted from the context alone. The physics repository's code zeroes VideoMAE's predictions, so that its
  published surprise is the size of the target; the paper does not say what it did. Held against `transformers`' own
  decoder and loss (`tests/test_eval_physics.py`).
- **Loss**: the mean over tokens and channels of a clip, then over the good clips of the global batch, then over the
  mask sets; the reference takes each rank's mean. Equal where all ranks hold equally many clips.
"""
