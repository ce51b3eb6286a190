"""Names of what can be chosen, with what each is: for the command line, which reads options before torch is imported."""

from collections.abc import Mapping

# How images are resized, data/preprocess.py.
RESIZES = {
    "adm": "halved (box) while both sides stay at least the size, shorter side to the size (bicubic), middle cropped: ADM",
    "lanczos": "middle square cropped, then resized (Lanczos): StyleGAN's and EDM's dataset tools",
}
MODES = ("RGB", "L")
# Options of a table of images, which samples and reference may have differently.
OF_SAMPLES = ("split", "subset", "image_column", "label_column")

# Extractors of features, evaluation/features.py.
FEATURES = (
    "inception[:WEIGHTS], dinov2[:WEIGHTS], clip[:WEIGHTS], timm:NAME[:WEIGHTS], torchvision:NAME[:WEIGHTS], "
    "fdr:ENCODER[:WEIGHTS] of FD-loss, fdr6[:FOLDER] for all six of them, classifier:CLASSIFIER.yaml or PYTHON.MODULE:NAME"
)

# Metrics, evaluation/metrics.py: splits and blocks of Inception scores, subsets of KID, neighbors of density and coverage.
SPLITS, BLOCK, SUBSETS, NEIGHBORS = 10, 5000, 100, 5
METRIC_OPTIONS: Mapping[str, str] = {
    "fid": "Fréchet distance of pooled features: FID with Inception, FD-DINOv2 with DINOv2",
    "sfid": "Fréchet distance of spatial features (ADM's sFID)",
    "is": f"Inception score, mean of {SPLITS} shuffled splits (as torch-fidelity)",
    "is_adm": f"Inception score as ADM's evaluator: mean of blocks of {BLOCK:,}, not shuffled",
    "kid": f"kernel distance (KID with Inception), {SUBSETS} subsets",
    "fdr": "Fréchet distance over that of real validation images (--validation)",
    "mind": "sliced distance of 1,000 directions (MIND with Inception)",
    "cmmd": "CMMD, with CLIP features",
    "pr": "improved precision and recall, distances in float64",
    "pr_adm": "improved precision and recall as ADM's evaluator: distances in float16",
    "dc": f"density and coverage, k = {NEIGHBORS}",
    "classwise": "fid, pr and dc of each class with enough images",
    "classifier": "accuracy and ECE of the evaluation classifier on the samples",
    "clip": "mean cosine similarity between sample and prompt",
}
