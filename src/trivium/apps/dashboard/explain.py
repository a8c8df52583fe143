"""What each stage does and what each curve means, in plain words: the prose of the walkthrough.

Unknown stages and metrics (those of a user's own code) are shown too, just without prose.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One stage in plain words: `about` says what it does, `watch` what a reader should look at.

    `headline` names the metrics that may stand on the stage's card, the first one that was logged is taken.
    """

    title: str
    about: str
    watch: str = ""
    headline: tuple[str, ...] = ()


STAGES: dict[str, Explanation] = {
    "data_prep": Explanation(
        title="Cleaning the text",
        about="Raw files become clean documents. Every document passes a row of filters (too short, mostly symbols, "
        "the wrong language, seen before); the first filter that objects names its reason, and the document "
        "is dropped. Nothing is dropped silently: the reasons are counted here.",
        watch="Which reasons dominate, and whether the dropped examples deserved it.",
    ),
    "train_tokenizer": Explanation(
        title="Learning the alphabet",
        about="A model reads numbers, not letters. Byte-pair encoding starts from single bytes and keeps merging "
        "the most frequent neighbours until the vocabulary is full, so common words become one token and rare "
        "ones a few. The whole corpus is then stored as numbers, ready to be read at speed.",
        watch="Bytes per token: the higher, the more text fits into the model's context.",
    ),
    "pretrain": Explanation(
        title="Pre-training",
        about="The model reads the corpus and learns one thing: to predict the next token. Nobody labels anything; "
        "the text is its own answer. Grammar and facts come out of this. The result continues text well, but "
        "it does not yet know that it is being asked something.",
        watch="Held-out bits per byte, which can be compared between tokenizers, and the samples turning from noise "
        "into sentences.",
        headline=("eval/bits_per_byte", "eval/loss", "train/loss"),
    ),
    "adapt": Explanation(
        title="Learning a domain",
        about="A model that exists goes on reading, now the text of one domain. It learns that domain's words and "
        "facts, and tends to forget what it no longer reads. So some rows of general text are mixed in (replay), and "
        "both kinds of text are measured before and after.",
        watch="The gain on the domain beside the forgetting: bits per byte of general text that rise are the price.",
        headline=("eval/domain_bits_per_byte", "train/loss"),
    ),
    "sft": Explanation(
        title="Supervised fine-tuning",
        about="The base model is shown conversations with ideal answers and learns to give such answers. It reads "
        "every token, but is trained only on the assistant's: the highlighted ones in the specimens. This "
        "teaches the form of an answer far more than new knowledge.",
        watch="Held-out loss: when it turns upward while the training loss still falls, the model has begun to "
        "memorise.",
        headline=("eval/loss", "train/loss"),
    ),
    "collect_comparisons": Explanation(
        title="Collecting judgements",
        about="The fine-tuned model answers each prompt several times, and the answers are ranked, best first; ties "
        "are allowed. It is easier to say which answer is better than to write the best one. Who judged is "
        "always kept: people, an AI judge, or simulated annotators.",
        watch="How often annotators agree with one another: no reward model can be expected to do better than that.",
    ),
    "reward_model": Explanation(
        title="Learning the judgement",
        about="A second model learns to give every answer one number, such that better-ranked answers score higher. "
        "It stands in for the annotators from here on, because reinforcement learning asks for far more "
        "judgements than people could give.",
        watch="Accuracy on held-out pairs, beside the annotators' own agreement; a coin would get half.",
        headline=("eval/accuracy", "train/accuracy", "train/loss"),
    ),
    "ppo": Explanation(
        title="Reinforcement learning (PPO)",
        about="The model writes answers, the reward model scores them, and tokens that led to better scores than "
        "expected become more likely. A penalty (KL) is paid for every step away from the fine-tuned model, "
        "because the reward model is only right near what it has seen.",
        watch="The score should rise while KL stays small; score rising with true quality falling means that the "
        "reward model is being fooled.",
        headline=("rollout/score", "rollout/true_taste", "rollout/kl"),
    ),
    "dpo": Explanation(
        title="Direct preference optimisation",
        about="The shortcut: the same rankings train the model directly. Chosen answers are made more likely than "
        "rejected ones, measured against the fine-tuned model, with no reward model and no sampling in "
        "between.",
        watch="The margin between chosen and rejected, and how often chosen wins.",
        headline=("eval/accuracy", "train/accuracy", "train/margin", "train/loss"),
    ),
    "grpo": Explanation(
        title="Checkable rewards (GRPO)",
        about="For tasks whose answers can be checked, such as sums, no reward model is needed. The model answers "
        "each question several times; answers better than their group's average become more likely, the "
        "others less.",
        watch="The average reward: it is the share of answers that pass the check.",
        headline=("rollout/reward", "rollout/kl"),
    ),
    "rejection_sampling": Explanation(
        title="Learning from the best of many",
        about="The model answers each prompt several times, the reward model picks the best answer, and the model is "
        "fine-tuned on what was picked. Then it answers again. Nothing but fine-tuning, at the price of many "
        "answers written for each one learned.",
        watch="How far the picked answers are above the average: that is what a round can teach.",
        headline=("rollout/picked_score", "rollout/score", "rollout/true_taste", "rollout/kl"),
    ),
    "constitutional_ai": Explanation(
        title="Learning from principles",
        about="Instead of people, written principles judge. The model's answer is criticised in the light of a "
        "principle, rewritten, and the rewritten answers become training examples; a principle can also rank "
        "two answers, which gives preferences without an annotator.",
        watch="Whether the revisions follow the critique, or only sound as if they did.",
        headline=("eval/loss", "train/loss"),
    ),
    "evaluate": Explanation(
        title="Measuring",
        about="All stages answer the same held-out questions, none of which occurred in training. Each figure comes "
        "with the interval in which the true value lies with 95% confidence: where two intervals overlap a "
        "lot, the difference may be chance.",
        watch="What each stage gained, and what it cost elsewhere.",
    ),
    "export": Explanation(
        title="Export",
        about="The finished model is written as a Hugging Face folder which other programs load without any code of "
        "ours.",
        watch="That the exported model gives the same numbers as ours.",
    ),
}
"""In the order of the pipeline."""

METRICS: dict[str, str] = {
    "train/loss": "The loss being minimised, per item (a token, a ranked prompt); nats for a log-likelihood.",
    "eval/loss": "The same loss on held-out data, which the model never trains on.",
    "eval/bits_per_byte": (
        "Bits needed to store one byte of held-out text; comparable between tokenizers. Lower is better."
    ),
    "eval/domain_bits_per_byte": "Bits per byte of the domain's held-out text: what adaptation lowers.",
    "eval/general_bits_per_byte": "Bits per byte of held-out general text: where it rises, the model forgets.",
    "train/lr": "Learning rate: the size of the steps, warmed up and then lowered.",
    "train/grad_norm": "Length of the gradient before clipping. Spikes mean that a batch was a shock.",
    "train/tokens_per_s": "Tokens trained per second.",
    "train/mfu": "Share of the machine's measured matrix-product speed that training uses (model FLOPs utilisation).",
    "train/data_s": "Seconds that the loop waited for its batches since the last logged step.",
    "train/checkpoint_s": "Seconds that the loop gave to saving checkpoints since the last logged step.",
    "train/skipped": "Steps passed over because the gradient was not finite, or a spike.",
    "train/accuracy": "Share of training pairs in which the chosen answer gets the higher score.",
    "eval/accuracy": "The same share on held-out pairs. 0.5 is a coin.",
    "train/margin": "By how much the implicit reward of the chosen answer exceeds that of the rejected one, in nats.",
    "rollout/score": "Mean reward-model score of the sampled answers, before the KL penalty.",
    "rollout/picked_score": "Mean reward-model score of the answers that were picked to learn from.",
    "rollout/picked_frac": "Share of the answers to be picked that were good enough to be learned.",
    "rollout/reward": "Mean reward of the sampled answers.",
    "rollout/kl": "How far the policy has moved from the reference, in nats per answer (an estimate from samples).",
    "rollout/length": (
        "Mean length of the sampled answers, in tokens. A steady climb often means that length is being rewarded."
    ),
    "rollout/true_taste": (
        "Mean score under the true taste, which training never sees. The distance to the reward model's score "
        "is over-optimisation."
    ),
    "train/policy_loss": "Clipped policy objective, negated.",
    "train/value_loss": "Squared error of the value model's forecast of the return.",
    "train/clip_frac": "Share of tokens whose probability moved so far that the update was clipped.",
    "train/kl_coef": "The price of KL; the adaptive controller raises it when KL exceeds its target.",
    "train/approx_kl": "How far one round of updates moves the policy from the one that sampled, in nats per token.",
    "train/num_steps": "Optimizer steps of the round; fewer than planned where the policy had moved far enough.",
    "train/ptx_loss": "Loss per token, in nats, on the pre-training text that is mixed in so that it is not forgotten.",
    "rollout/value": "What the value model expects of the answers, on average.",
    "rollout/unfinished_frac": "Share of answers that were cut off before they had ended.",
    "rollout/logprob_gap": "Largest disagreement of sampling and training about a token; above noise, it is a bug.",
    "rollout/zero_variance_frac": "Share of groups whose answers all got the same reward: they teach nothing.",
    "train/entropy": (
        "Uncertainty about the next token, in nats. A fall towards zero means answers are becoming all alike."
    ),
}

SPECIMENS: dict[str, str] = {
    "dropped": "Documents that were dropped, and the reason.",
    "masked_conversation": "Highlighted tokens are trained; the others are only read.",
    "ranking": "Answers to one prompt as they were ranked, best first.",
    "rollout": "Sampled answers, token by token. Choose what the colour shows.",
    "candidates": "All answers to one prompt, best first by the reward model; the picked ones are learned.",
    "generation": "One question, answered by every model.",
    "tokens": "A held-out text, cut into tokens.",
    "revision": "An answer, its critique in the light of a principle, and the rewritten answer.",
}


def explain(stage: str) -> Explanation:
    """Return the stage in plain words; a stage of the user's own gets its name as title and no prose."""
    return STAGES.get(stage) or Explanation(title=stage.rpartition(".")[2].replace("_", " ").capitalize(), about="")
