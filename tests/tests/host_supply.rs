//! What the programs are made of: dependencies by licence and source, as `deny.toml` says, without the network.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::path::Path;
use std::process::Command;

use rackvisor_tests::output;
use serde_json::Value;

/// Whether one of the licences that can be chosen is allowed, for each part that is needed (SPDX expressions without nesting).
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    let part = |part: &str| {
        let part = part.trim().trim_matches(['(', ')']);
        part.split(" OR ").flat_map(|choice| choice.split('/')).any(|choice| allowed.contains(&choice.trim()))
    };
    expression.split(" AND ").all(part)
}

#[test]
fn expressions_of_licences_are_choices_and_sums() {
    let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"];
    for good in
        ["MIT", "GPL-2.0 OR MIT", "Apache-2.0/GPL-3.0", "(MIT OR X) AND Apache-2.0", "Apache-2.0 WITH LLVM-exception"]
    {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-3.0"] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}

#[test]
fn every_dependency_comes_from_crates_io_under_a_licence_that_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let rules: toml::Table = std::fs::read_to_string(root.join("deny.toml")).unwrap().parse().unwrap();
    let list = |section: &str, name: &str| -> Vec<String> {
        let items = rules[section][name].as_array().unwrap();
        items.iter().map(|item| item.as_str().unwrap().to_owned()).collect()
    };
    let (allowed, banned) = (list("licenses", "allow"), list("bans", "deny"));
    let allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
    let arguments =
        ["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform=x86_64-unknown-linux-gnu"];
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let (status, told, error) = output(Command::new(cargo).args(arguments).current_dir(root));
    assert_eq!(status, 0, "{error}");
    let told: Value = serde_json::from_str(&told).unwrap();
    let packages = told["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{}", packages.len());
    let mut wrong = Vec::new();
    for package in packages {
        let (name, licence) = (package["name"].as_str().unwrap(), package["license"].as_str().unwrap_or_default());
        let ours = package["source"].is_null();
        let from_crates_io = package["source"] == "registry+https://github.com/rust-lang/crates.io-index";
        if !is_allowed(licence, &allowed) || !(ours || from_crates_io) || banned.iter().any(|banned| banned == name) {
            wrong.push(format!("{name} {}: {licence:?} from {}", package["version"], package["source"]));
        }
    }
    assert!(wrong.is_empty(), "not as deny.toml says:\n{}", wrong.join("\n"));
}
