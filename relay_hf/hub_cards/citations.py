"""BibTeX of the methods that a card can be about."""

RELAY_CITATION = """@misc{rozonoyer2026relay,
  title         = {Learned Relay Representations for Forward-Thinking Discrete Diffusion Models},
  author        = {Rozonoyer, Benjamin and Minniti, Jacopo and Patel, Dhruvesh and Band, Neil and Bose, Avishek Joey
                   and Rudner, Tim G. J. and McCallum, Andrew},
  year          = {2026},
  eprint        = {2605.22967},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG},
  url           = {https://arxiv.org/abs/2605.22967}
}"""

FAST_DLLM_V2_CITATION = """@misc{wu2025fastdllm,
  title         = {Fast-dLLM v2: Efficient Block-Diffusion LLM},
  author        = {Wu, Chengyue and Zhang, Hao and Xue, Shuchen and Diao, Shizhe and Fu, Yonggan and Liu, Zhijian
                   and Molchanov, Pavlo and Luo, Ping and Han, Song and Xie, Enze},
  year          = {2025},
  eprint        = {2509.26328},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2509.26328}
}"""
