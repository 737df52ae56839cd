//! Prints the OpenAPI document: `cargo run -p rackvisor-api --example openapi > resources/openapi.json`.

fn main() -> Result<(), serde_json::Error> {
    println!("{}", rackvisor_api::server::openapi().to_pretty_json()?);
    Ok(())
}
