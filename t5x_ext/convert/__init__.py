"""Models of other projects, in and out: BERT-like encoders from Hugging Face's files."""

from t5x_ext.convert.bert import ENCODER_TASK, BertFiles, encoder_config, encoder_params, import_encoder, read_bert

__all__ = ["ENCODER_TASK", "BertFiles", "encoder_config", "encoder_params", "import_encoder", "read_bert"]
