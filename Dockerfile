# The three programs of Weft, and nothing else.
#
#   docker build -t weft .

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked -p weft-cli -p weft-controller -p weft-proxy \
    && install -D -t /out target/release/weft target/release/weft-controller target/release/weft-proxy

FROM debian:bookworm-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin weft
COPY --from=build /out/ /usr/local/bin/
COPY compose/ /etc/weft/
COPY crates/localmesh/samples/mesh.yaml /etc/weft/mesh.yaml
USER weft
ENTRYPOINT []
CMD ["weft", "--help"]
