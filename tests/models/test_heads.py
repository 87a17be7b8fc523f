"""The output layer is found, replaced, and filled with solved weights."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import alexnet, densenet121, maxvit_t, resnet18, squeezenet1_1, vit_b_32

from finetune.errors import ModelError
from finetune.models.heads import head_layers, head_module, load_linear_head, output_kind, replace_head
from finetune.models.initialize import build_backbone

FAMILIES = ("resnet", "alexnet", "vgg", "squeezenet", "densenet", "inception")


def test_replaced_layer_keeps_inputs_kernel_and_bias() -> None:
    for model, inputs in ((resnet18(), 512), (densenet121(), 1024), (vit_b_32(), 768)):
        replace_head(model, 7)
        layer = head_module(model)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (inputs, 7)
        assert layer.bias is not None
    with torch.device("meta"):
        maxvit = maxvit_t()
        replace_head(maxvit, 7)
    assert head_module(maxvit).bias is None
    squeezenet = squeezenet1_1()
    replace_head(squeezenet, 7)
    assert head_module(squeezenet).weight.shape == (7, 512, 1, 1)


def test_timm_heads_of_every_shape() -> None:
    with torch.device("meta"):
        for name, layers in (
            ("resnetv2_50", ["head.fc"]),
            ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
            ("caformer_s18", ["head.fc.fc2"]),
            ("repvit_m0_9", ["head.head.l"]),
            ("vit_small_patch14_dinov2", ["head"]),  # has no head until it is given one
        ):
            model = timm.create_model(name)
            replace_head(model, 7)
            assert head_layers(model) == layers
            assert head_module(model).weight.shape[0] == 7


def test_encoder_without_output_layer_is_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("qwen3_vit_88m_enc")
    with pytest.raises(ModelError, match="no linear or convolutional output layer"):
        replace_head(model, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_log_softmax_head_puts_out_probabilities(name: str) -> None:
    backbone = build_backbone(name, num_classes=7, use_pretrained=False, head="log_softmax")
    model = backbone.module
    assert output_kind(model) == "log_softmax"
    assert head_module(model).weight.shape[0] == 7
    size_px = backbone.input_spec.image_size_px if name == "inception" else 96
    with torch.no_grad():
        outputs_NK = [model.eval()(torch.rand(2, 3, size_px, size_px))]
        if name == "inception":
            outputs_NK += model.train()(torch.rand(2, 3, size_px, size_px))
    for output_NK in outputs_NK:
        assert output_NK.shape == (2, 7)
        torch.testing.assert_close(output_NK.exp().sum(dim=1), torch.ones(2))


def test_log_softmax_of_averaged_heads_is_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224")
        with pytest.raises(ModelError, match="averages several heads"):
            replace_head(model, 7, head="log_softmax")


@pytest.mark.parametrize("head", ["logits", "log_softmax"])
def test_pre_hook_sees_the_features_and_solved_weights_are_used(head: str) -> None:
    model = resnet18()
    replace_head(model, 7, head=head)  # type: ignore[arg-type]
    model.eval()
    assert output_kind(model) == head
    weight_KD, bias_K = torch.randn(7, 512), torch.randn(7)
    load_linear_head(model, weight_KD, bias_K)
    features: list[Tensor] = []
    head_module(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        output_NK = model(torch.rand(2, 3, 64, 64))
    logits_NK = features[0] @ weight_KD.T + bias_K
    expected_NK = logits_NK if head == "logits" else logits_NK.log_softmax(dim=1)
    torch.testing.assert_close(output_NK, expected_NK)


def test_solved_weights_need_a_single_linear_layer_of_their_size() -> None:
    weight_KD, bias_K = torch.zeros(7, 512), torch.zeros(7)
    with pytest.raises(ModelError, match=r"\(1000, 512\).*\(7, 512\)"):
        load_linear_head(resnet18(), weight_KD, bias_K)
    with pytest.raises(ModelError, match="not a single linear layer"):
        load_linear_head(squeezenet1_1(), weight_KD, bias_K)
    with torch.device("meta"):
        maxvit, distilled = maxvit_t(), timm.create_model("deit_tiny_distilled_patch16_224")
    with pytest.raises(ModelError, match="no bias"):
        load_linear_head(maxvit, weight_KD, bias_K)
    with pytest.raises(ModelError, match="not a single linear layer"):
        load_linear_head(distilled, weight_KD, bias_K)


def test_log_softmax_leaves_the_path_of_a_layer_in_a_sequential() -> None:
    model = alexnet()
    replace_head(model, 7, head="log_softmax")
    assert head_layers(model) == ["classifier.6"]
    assert isinstance(model.classifier[-1], nn.LogSoftmax)
