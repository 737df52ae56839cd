//! Few combinations of settings in which every pair of values is met.

/// Combinations of factors, of which factor `i` has the values `0..levels[i]`, so that each two values of each two factors
/// stand together in one of them at least. The same levels give the same combinations.
pub fn pairwise(levels: &[usize]) -> Vec<Vec<usize>> {
    let mut missing: Vec<[(usize, usize); 2]> = Vec::new();
    for (second, values) in levels.iter().enumerate() {
        for (first, others) in levels[..second].iter().enumerate() {
            missing.extend((0..others * values).map(|n| [(first, n % others), (second, n / others)]));
        }
    }
    let mut rows = Vec::new();
    while let Some(&[(first, a), (second, b)]) = missing.first() {
        let mut row: Vec<Option<usize>> = vec![None; levels.len()];
        (row[first], row[second]) = (Some(a), Some(b));
        for factor in 0..levels.len() {
            if row[factor].is_none() {
                // The value that meets most of what is missing.
                let met = |value: usize| missing.iter().filter(|pair| meets(&row, factor, value, pair)).count();
                row[factor] = (0..levels[factor]).rev().max_by_key(|&value| met(value));
            }
        }
        let row: Vec<usize> = row.into_iter().map(Option::unwrap).collect();
        missing.retain(|pair| !pair.iter().all(|&(factor, value)| row[factor] == value));
        rows.push(row);
    }
    rows
}

/// Whether `factor` at `value` completes a pair with what is chosen already.
fn meets(row: &[Option<usize>], factor: usize, value: usize, &[one, other]: &[(usize, usize); 2]) -> bool {
    let chosen = |(other, wanted): (usize, usize)| row[other] == Some(wanted);
    (one == (factor, value) && chosen(other)) || (other == (factor, value) && chosen(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_two_values_of_each_two_factors_stand_together_in_few_combinations() {
        let levels = [3, 3, 2, 2, 2, 2, 2, 2, 2];
        let rows = pairwise(&levels);
        for second in 0..levels.len() {
            for first in 0..second {
                for (a, b) in (0..levels[first]).flat_map(|a| (0..levels[second]).map(move |b| (a, b))) {
                    let together = |row: &Vec<usize>| row[first] == a && row[second] == b;
                    assert!(rows.iter().any(together), "{first}={a} with {second}={b}");
                }
            }
        }
        assert!(rows.len() <= 12, "{} combinations", rows.len());
    }
}
