package packaging
