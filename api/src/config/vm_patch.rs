//! Changes of the VM as a whole.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::patch::{Patch, apply};
use super::{BalloonConfig, BalloonPatch, Guid, VmConfig};
use crate::problem::{Code, Pointer, Problem};
use crate::size::ByteSize;

/// Changes to a [`VmConfig`] as a JSON merge patch: a field that is absent stays, `null` takes it away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// Another generation ID. The guest, if there is one, is told.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<Guid>)]
    pub generation_id: Patch<Guid>,
    /// Changes to the balloon, whose size may change while the guest exists.
    #[serde(default, skip_serializing_if = "Patch::is_keep")]
    #[schema(value_type = Option<BalloonPatch>)]
    pub balloon: Patch<BalloonPatch>,
}

impl VmPatch {
    /// The configuration after the patch. While the guest exists, it cannot get or lose a device.
    ///
    /// # Errors
    /// `hotplug-unsupported`, or the result would not be valid.
    pub fn apply(&self, old: &VmConfig, guest_exists: bool) -> Result<VmConfig, Problem> {
        let generation_id = apply(&self.generation_id, &old.generation_id);
        if guest_exists && generation_id.is_some() != old.generation_id.is_some() {
            let detail = "the guest cannot get or lose the device that tells its generation ID while it exists";
            return Err(Problem::new(Code::HotplugUnsupported, detail, "shut the VM down first")
                .at(&Pointer::root().key("generation_id")));
        }
        let balloon = BalloonPatch::apply_to(&self.balloon, &old.balloon);
        let fixed = |balloon: &BalloonConfig| BalloonConfig { size: ByteSize(0), ..balloon.clone() };
        if guest_exists && balloon.as_ref().map(fixed) != old.balloon.as_ref().map(fixed) {
            let detail = "of the balloon only its size can change while the guest exists";
            return Err(Problem::new(Code::HotplugUnsupported, detail, "shut the VM down first")
                .at(&Pointer::root().key("balloon")));
        }
        let changed = VmConfig { generation_id, balloon, ..old.clone() };
        changed.validate()?;
        Ok(changed)
    }
}
