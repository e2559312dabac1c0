"""Preference data: readers of many layouts, one record, and pairs ready to train on."""

DATASETS: dict[str, str] = {
    "jsonl": "diffalign.data.readers:read_jsonl",
    "pickapic": "diffalign.data.pickapic:read_pickapic",
    "folders": "diffalign.data.readers:read_folders",
    "hpdv2": "diffalign.data.readers:read_hpdv2",
    "videoalign": "diffalign.data.videoalign:read_videoalign",
    "webdataset": "diffalign.data.webdataset:read_webdataset",
}
