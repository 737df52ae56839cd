//! How the machine introduces itself to the guest (SMBIOS).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Guid;
use crate::problem::{Pointer, Problem};

/// The most bytes of each text.
const MAX_TEXT: usize = 64;

/// How the machine introduces itself to the guest: SMBIOS structures 1 (system) and 3 (chassis). Texts are 1 to 64 bytes of
/// printable ASCII.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SmbiosConfig {
    /// The manufacturer. Default: `Rackvisor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub manufacturer: Option<String>,
    /// The product. Default: `Virtual Machine`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub product: Option<String>,
    /// The version of the product. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub version: Option<String>,
    /// The serial number. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub serial: Option<String>,
    /// The stock keeping unit. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub sku: Option<String>,
    /// The family of products. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub family: Option<String>,
    /// The asset tag of the chassis. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub asset_tag: Option<String>,
    /// The identity of the machine. Default: the guest is told that there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Guid>,
}

impl SmbiosConfig {
    pub(super) fn check(&self, at: &Pointer) -> Result<(), Problem> {
        let Self { manufacturer, product, version, serial, sku, family, asset_tag, uuid: _ } = self;
        let texts = [
            ("manufacturer", manufacturer),
            ("product", product),
            ("version", version),
            ("serial", serial),
            ("sku", sku),
            ("family", family),
            ("asset_tag", asset_tag),
        ];
        let fits =
            |text: &String| (1..=MAX_TEXT).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b));
        match texts.into_iter().find(|(_, text)| text.as_ref().is_some_and(|text| !fits(text))) {
            Some((name, _)) => Err(Problem::invalid(
                &at.key(name),
                "this text is not possible",
                format!("use 1 to {MAX_TEXT} bytes of printable ASCII, or leave it out"),
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_printable_and_short() {
        let with = |serial: &str| SmbiosConfig { serial: Some(serial.into()), ..SmbiosConfig::default() };
        for bad in ["", "a\nb", "\u{e4}", &"x".repeat(65)] {
            assert_eq!(with(bad).check(&Pointer::root()).unwrap_err().pointer.as_deref(), Some("/serial"), "{bad:?}");
        }
        with(&"x".repeat(64)).check(&Pointer::root()).unwrap();
    }
}
