//! The OpenAPI document, made from the same types and handlers that serve.

use utoipa::OpenApi as _;
use utoipa::openapi::{Info, LicenseBuilder, OpenApi};

use super::routes::Document;
use crate::VERSION;

/// The document as `GET /v1/openapi.json` serves it: a file of the repository, so that it costs no private memory, and
/// a change of the API shows in review. A test fails when it is not what [`openapi`] makes.
pub const OPENAPI_JSON: &str = include_str!("../../../resources/openapi.json");

/// Makes the document.
pub fn openapi() -> OpenApi {
    let mut document = Document::openapi();
    let mut info = Info::new("Rackvisor", VERSION);
    info.description = Some(
        "One virtual machine per process, driven over HTTP/1.1 on a Unix socket. Every error is a problem document \
         (RFC 9457) with a stable `code`, and a JSON pointer to the field at fault. A request takes effect whole or \
         not at all. Besides what each operation lists, any request may be answered with 400, 404, 405, 414 or 431."
            .into(),
    );
    info.license = Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build());
    document.info = info;
    document
}
