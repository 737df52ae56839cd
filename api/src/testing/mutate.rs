//! Bad documents, made from good ones. Each is bad by construction, or by the verdict of a parser that knows nothing
//! of the schema: so a server that takes one is wrong, whatever the schema's own code says.

use serde_json::{Map, Value};

/// One bad document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// What was done to the good one.
    pub what: &'static str,
    /// The bytes.
    pub body: Vec<u8>,
}

/// An endless, reproducible stream of bad documents.
#[derive(Clone, Debug)]
pub struct Mutations {
    document: Value,
    random: u64,
    turn: usize,
}

type Mutator = fn(&mut Mutations) -> Option<Vec<u8>>;

/// All ways to spoil a document.
const MUTATORS: [(&str, Mutator); 9] = [
    ("truncated", Mutations::truncated),
    ("a byte changed", Mutations::flipped),
    ("a control byte put in", Mutations::control_byte),
    ("the type of a value changed", Mutations::other_type),
    ("a number grown", Mutations::huge_number),
    ("nested deeply", Mutations::deeply_nested),
    ("a key given twice", Mutations::duplicate_key),
    ("an unknown key put in", Mutations::unknown_key),
    ("a text grown", Mutations::long_text),
];

/// A step from a value to one of its children.
#[derive(Clone, Debug)]
enum Step {
    Key(String),
    Index(usize),
}

/// What is written in the place of the node that a mutation is about.
enum Edit<'a> {
    /// This text instead of the value.
    Replace(&'a str),
    /// This text before the members of the object.
    Prepend(&'a str),
}

impl Mutations {
    /// Spoils `document`, a valid JSON object whose numbers are of at most 32 bits, in ways that follow from `seed`.
    pub fn new(document: Value, seed: u64) -> Self {
        Self { document, random: seed, turn: 0 }
    }

    /// splitmix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.random() % bound).unwrap_or(0)
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> Option<T> {
        let index = self.below(items.len());
        items.get(index).cloned()
    }

    /// A node that fits, and its value.
    fn node(&mut self, fits: fn(&Value) -> bool) -> Option<(Vec<Step>, Value)> {
        let mut found = Vec::new();
        collect(&self.document, &mut Vec::new(), fits, &mut found);
        self.pick(&found)
    }

    fn text(&self) -> Vec<u8> {
        self.document.to_string().into_bytes()
    }

    fn edited(&self, at: &[Step], edit: &Edit<'_>) -> Vec<u8> {
        let mut text = String::new();
        write(&self.document, Some(at), edit, &mut text);
        text.into_bytes()
    }

    fn truncated(&mut self) -> Option<Vec<u8>> {
        let mut text = self.text();
        let length = self.below(text.len());
        text.truncate(length);
        Some(text)
    }

    fn flipped(&mut self) -> Option<Vec<u8>> {
        let mut text = self.text();
        let (at, bit) = (self.below(text.len()), self.below(8));
        *text.get_mut(at)? ^= 1 << bit;
        // Within a string most changes are as good as what was there before.
        serde_json::from_slice::<Value>(&text).is_err().then_some(text)
    }

    fn control_byte(&mut self) -> Option<Vec<u8>> {
        let mut text = self.text();
        let (at, byte) = (self.below(text.len()), self.pick(&[0x00, 0x01, 0x08, 0x0b, 0x1f, 0x80, 0xc0, 0xff])?);
        text.insert(at, byte);
        Some(text)
    }

    fn other_type(&mut self) -> Option<Vec<u8>> {
        let (at, value) = self.node(|_| true)?;
        let others: &[&str] = match value {
            Value::String(_) => &["true", "-1.5", "[]", "{}", "[null]"],
            Value::Number(_) => &["true", "-1.5", "[]", "{}", "\"1\"", "-1"],
            Value::Bool(_) => &["1", "\"true\"", "[]", "{}", "\"\""],
            Value::Array(_) => &["true", "1", "\"\"", "{}", "null", "[null]"],
            Value::Object(_) => &["true", "1", "\"\"", "[]", "[1]"],
            Value::Null => return None,
        };
        let other = self.pick(others)?;
        Some(self.edited(&at, &Edit::Replace(other)))
    }

    fn huge_number(&mut self) -> Option<Vec<u8>> {
        let (at, _) = self.node(Value::is_number)?;
        let huge = self.pick(&[
            "1e400",
            "-1e400",
            "4294967296",
            "18446744073709551615",
            "18446744073709551616",
            "1e9",
            "99999999999999999999999999999999",
        ])?;
        Some(self.edited(&at, &Edit::Replace(huge)))
    }

    fn deeply_nested(&mut self) -> Option<Vec<u8>> {
        let (at, _) = self.node(|_| true)?;
        let depth = self.pick(&[129, 1000, 20_000])?;
        let (open, close) = self.pick(&[("[", "]"), ("{\"a\":", "}")])?;
        let nested = format!("{}0{}", open.repeat(depth), close.repeat(depth));
        Some(self.edited(&at, &Edit::Replace(&nested)))
    }

    fn duplicate_key(&mut self) -> Option<Vec<u8>> {
        let (at, value) = self.node(|value| value.as_object().is_some_and(|object| !object.is_empty()))?;
        let members: Vec<_> =
            value.as_object()?.iter().map(|(key, value)| format!("{}:{value},", Value::from(key.as_str()))).collect();
        let member = self.pick(&members)?;
        Some(self.edited(&at, &Edit::Prepend(&member)))
    }

    fn unknown_key(&mut self) -> Option<Vec<u8>> {
        let (at, value) = self.node(Value::is_object)?;
        let comma = if value.as_object().is_some_and(Map::is_empty) { "" } else { "," };
        let key = self.pick(&["", "x", "Name", "__proto__", "id ", "a/b~c", "\\u0000", "\\ud83d\\ude00"])?;
        let value = self.pick(&["null", "0", "{}", "[]", "\"x\""])?;
        Some(self.edited(&at, &Edit::Prepend(&format!("\"{key}\":{value}{comma}"))))
    }

    fn long_text(&mut self) -> Option<Vec<u8>> {
        let (at, _) = self.node(Value::is_string)?;
        let unit = self.pick(&["x", "9", "\\u0000", "é", "../"])?;
        Some(self.edited(&at, &Edit::Replace(&format!("\"{}\"", unit.repeat(5000)))))
    }
}

impl Iterator for Mutations {
    type Item = Mutation;

    fn next(&mut self) -> Option<Mutation> {
        // A way that does not fit this document or draw is passed over; truncation always fits.
        loop {
            let (what, mutate) = *MUTATORS.get(self.turn % MUTATORS.len())?;
            self.turn = self.turn.wrapping_add(1);
            if let Some(body) = mutate(self) {
                return Some(Mutation { what, body });
            }
        }
    }
}

fn collect(value: &Value, at: &mut Vec<Step>, fits: fn(&Value) -> bool, found: &mut Vec<(Vec<Step>, Value)>) {
    if fits(value) {
        found.push((at.clone(), value.clone()));
    }
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                at.push(Step::Key(key.clone()));
                collect(member, at, fits, found);
                at.pop();
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                at.push(Step::Index(index));
                collect(item, at, fits, found);
                at.pop();
            }
        }
        _ => {}
    }
}

/// Writes `value` as JSON, with an edit at the node that `at` leads to, if it leads anywhere below `value`.
fn write(value: &Value, at: Option<&[Step]>, edit: &Edit<'_>, text: &mut String) {
    let here = at.is_some_and(<[Step]>::is_empty);
    if let (true, Edit::Replace(other)) = (here, edit) {
        text.push_str(other);
        return;
    }
    let next = at.and_then(<[Step]>::split_first);
    match value {
        Value::Object(members) => {
            text.push('{');
            if let (true, Edit::Prepend(member)) = (here, edit) {
                text.push_str(member);
            }
            for (index, (key, member)) in members.iter().enumerate() {
                text.push_str(if index > 0 { "," } else { "" });
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push(':');
                let below = next.and_then(|(step, rest)| matches!(step, Step::Key(k) if k == key).then_some(rest));
                write(member, below, edit, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                text.push_str(if index > 0 { "," } else { "" });
                let below = next.and_then(|(step, rest)| matches!(step, Step::Index(i) if *i == index).then_some(rest));
                write(item, below, edit, text);
            }
            text.push(']');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_documents_and_all_ways_are_used() {
        let document = crate::testing::full_config();
        let first: Vec<_> = Mutations::new(document.clone(), 1).take(100).collect();
        assert_eq!(first, Mutations::new(document.clone(), 1).take(100).collect::<Vec<_>>());
        assert_ne!(first, Mutations::new(document.clone(), 2).take(100).collect::<Vec<_>>());
        for (what, _) in MUTATORS {
            assert!(first.iter().any(|mutation| mutation.what == what), "{what}");
        }
        assert!(first.iter().all(|mutation| mutation.body != document.to_string().as_bytes()));
    }

    #[test]
    fn no_bad_document_is_a_configuration() {
        let good = crate::testing::full_config();
        VmConfig::from_json(good.to_string().as_bytes()).unwrap();
        for mutation in Mutations::new(good, 7).take(20_000) {
            let read = VmConfig::from_json(&mutation.body);
            assert!(read.is_err(), "{}: {}", mutation.what, String::from_utf8_lossy(&mutation.body));
        }
    }

    use crate::config::VmConfig;
}
