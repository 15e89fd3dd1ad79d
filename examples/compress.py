"""Two of sixteen layers removed, healed, measured: about a minute on two CPU cores."""

from hf_layerprune import IterativeLayerDistillConfig, IterativeLayerDistillTrainer, embedded_dataset

trainer = IterativeLayerDistillTrainer(
    model="embedded",  # a Hub id, a folder, or a loaded model
    args=IterativeLayerDistillConfig(
        output_dir="embedded-14", target_num_layers=14, max_steps=8, max_length=128, num_calibration_samples=16
    ),
    train_dataset=embedded_dataset("healing"),  # any dataset trl.SFTTrainer takes
    eval_dataset=embedded_dataset("held_out").select(range(16)),
)
trainer.train()  # or trainer.train(resume_from_checkpoint=True)
print(trainer.evaluate())
