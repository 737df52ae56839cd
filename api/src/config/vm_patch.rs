//! Changes of the VM as a whole.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::patch::{Patch, apply};
use super::{Guid, VmConfig};
use crate::problem::{Code, Pointer, Problem};

/// Changes to a [`VmConfig`] as a JSON merge patch: a field that is absent stays, `null` takes it away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// Another generation ID. The guest, if there is one, is told.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<Guid>)]
    pub generation_id: Patch<Guid>,
}

impl VmPatch {
    /// The configuration after the patch. While the guest exists, it cannot get or lose a device.
    ///
    /// # Errors
    /// `hotplug-unsupported`.
    pub fn apply(&self, old: &VmConfig, guest_exists: bool) -> Result<VmConfig, Problem> {
        let generation_id = apply(&self.generation_id, &old.generation_id);
        if guest_exists && generation_id.is_some() != old.generation_id.is_some() {
            let detail = "the guest cannot get or lose the device that tells its generation ID while it exists";
            return Err(Problem::new(Code::HotplugUnsupported, detail, "shut the VM down first")
                .at(&Pointer::root().key("generation_id")));
        }
        Ok(VmConfig { generation_id, ..old.clone() })
    }
}
