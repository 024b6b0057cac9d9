"""AGD Apply Adapter: the adapter that AGD Train has just made, used without its file."""

from comfy_api.v0_0_2 import io

from .common import AdapterType, use_adapter, use_inputs


class AGDApplyAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AGDApplyAdapter",
            display_name="AGD Apply Adapter",
            category="model/patch",
            description=(
                "Samples with guidance with one model evaluation per step, as AGD Adapter Loader does, with an adapter "
                "straight from AGD Train: on the same model with other settings, or on a sibling of it."
            ),
            search_aliases=["agd", "apply adapter"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. The adapter must be made for its family."),
                AdapterType.Input("adapter", tooltip="From AGD Train."),
                *use_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model, sampling with guidance in one model evaluation per step.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, adapter, **use) -> io.NodeOutput:
        return io.NodeOutput(use_adapter(model, adapter, cls.hidden.unique_id, **use))
