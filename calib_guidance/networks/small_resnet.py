"""A residual network for images too small for torchvision's stem."""

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """torchvision's residual block, whose import takes longer than everything else that digits need."""

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class SmallResNet(nn.Module):
    """ReLU/BatchNorm ResNet (He et al. 2015) with a stem that keeps the resolution.

    Args:
        num_classes: number of classes.
        in_channels: image channels.
        widths: channels of each stage; every stage after the first halves the resolution.
        blocks: residual blocks per stage.

    ``num_features`` is the width of :meth:`forward_features`, the pooled features before the last layer.

    Examples:
        >>> SmallResNet(num_classes=10, widths=(16, 32))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (32, 64, 64), blocks: int = 1
    ):
        super().__init__()
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers, previous = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride, shortcut = 2 if stage and not block else 1, None
                if stride != 1 or previous != width:
                    conv = nn.Conv2d(previous, width, 1, stride=stride, bias=False)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
                layers.append(BasicBlock(previous, width, stride, shortcut))
                previous = width
        self.stages = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(previous, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled features ``(N, num_features)`` of images ``(N, C, H, W)``."""
        return self.pool(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, num_classes)``."""
        return self.fc(self.forward_features(x))
