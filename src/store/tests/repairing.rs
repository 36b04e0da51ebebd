//! What a repair mends, and what it must leave alone.

use super::checking::{check, only, put, repair};
use super::*;
use crate::finding::Severity;

/// No check read them.
#[test]
fn damaged_attributes_of_a_kernel_are_found_and_forgotten() {
    let t = empty_store();
    let id = import_with_kernel(&t).kernel.unwrap();
    let attributes = format!("attrs/boot-{id}.json");
    put(&t.path(&attributes), b"{");
    let finding = only(&check(&t), "attributes", Severity::Warning);
    assert_eq!(finding.object, attributes);
    assert!(repair(&t).is_clean());
    assert_eq!((check(&t), t.path(&attributes).exists()), (vec![], false));
}
