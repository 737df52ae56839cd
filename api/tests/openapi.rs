//! The committed OpenAPI document.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]

mod support;

use std::collections::BTreeSet;

use hyper::Method;
use rackvisor_api::server::{OPENAPI_JSON, openapi};
use serde_json::Value;
use support::stage;

#[test]
fn the_committed_document_is_what_the_types_and_handlers_say() {
    let made = openapi().to_pretty_json().unwrap();
    let first = made.lines().zip(OPENAPI_JSON.lines()).find(|(made, committed)| made != committed);
    assert!(
        made.trim_end() == OPENAPI_JSON.trim_end(),
        "resources/openapi.json is stale (first difference: {first:?}).\n\
         Make it anew: cargo run -p rackvisor-api --example openapi > openapi.json && mv openapi.json resources/"
    );
}

fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            found.extend(members.get("$ref").and_then(Value::as_str).map(str::to_owned));
            members.values().for_each(|member| references(member, found));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}

#[test]
fn every_reference_of_the_document_leads_somewhere() {
    let document: Value = serde_json::from_str(OPENAPI_JSON).unwrap();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.contains("#/components/schemas/Problem"));
    for reference in found {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
}

#[test]
fn the_server_has_every_operation_of_the_document_and_no_other() {
    let stage = stage();
    let served = stage.client.request(Method::GET, "/v1/openapi.json", None).unwrap();
    let document: Value = served.json().unwrap();
    for (path, operations) in document["paths"].as_object().unwrap() {
        // A method that is never served, so that `Allow` tells which are.
        let answer = stage.client.exchange(Method::TRACE, &path.replace("{id}", "x"), None).unwrap();
        let mut served: Vec<_> =
            answer.allow.split(',').filter(|method| *method != "HEAD").map(str::to_lowercase).collect();
        served.sort_unstable();
        let mut described: Vec<_> = operations.as_object().unwrap().keys().cloned().collect();
        described.sort_unstable();
        assert_eq!(served, described, "{path}");
    }
    assert_eq!(document["paths"].as_object().unwrap().len(), 22);
}
